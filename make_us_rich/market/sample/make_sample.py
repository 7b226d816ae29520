"""Make the embedded sample from two pinned package files. Everything it needs to know is in this file.

    pip download --no-deps --no-binary :all: gapless-crypto-data==2.5.0
    pip download --no-deps --only-binary :all: gapless-crypto-data==2.0.1
    python make_sample.py gapless_crypto_data-2.5.0.tar.gz gapless_crypto_data-2.0.1-py3-none-any.whl

The same input gives the same candles, byte for byte in value; the Parquet bytes may differ between pyarrow versions.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

HOW_TO_GET = "\n".join(line.strip() for line in (__doc__ or "").splitlines() if line.strip().startswith("pip download"))
RENAME = {
    "date": "timestamp",
    "quote_asset_volume": "quote_av",
    "number_of_trades": "trades",
    "taker_buy_base_asset_volume": "tb_base_av",
    "taker_buy_quote_asset_volume": "tb_quote_av",
}
VALUES = ["open", "high", "low", "close", "volume", "quote_av", "trades", "tb_base_av", "tb_quote_av"]
COLUMNS = ["timestamp", "open", "high", "low", "close", "volume", "close_time", "quote_av", "trades", "tb_base_av", "tb_quote_av"]
HOUR = pd.Timedelta(hours=1)


@dataclass(frozen=True)
class Cut:
    """Which rows of which file become one sample file, and the hashes that say it is the file we looked at."""

    pair: str
    package_sha256: str
    member: str
    csv_sha256: str
    shipped_rows: int  # in the package's CSV
    true_rows: int  # after the cleaning rule, before the cut
    first: str
    last: str
    rows: int
    wrong_days: tuple[str, ...] = ()  # days whose rows carry another hour's candle


CUTS = (
    Cut(
        pair="BTC_USDT",
        package_sha256="ca363664c621c17af9dfe5f05f2027faac4e314dbbe8fc9f4539b3710488b631",
        member="gapless_crypto_data-2.5.0/test_data_large/binance_spot_BTCUSDT-1h_20140101-20240101_v2.5.0.csv",
        csv_sha256="9fc13c0eb54a069e65aeb2f9412cbb01822d86cd26264b33687c1c959e99f486",
        shipped_rows=55_861,
        true_rows=55_741,
        first="2022-01-01T00:00Z",
        last="2023-12-31T23:00Z",
        rows=17_495,
        wrong_days=("2023-01-01",),
    ),
    Cut(
        pair="SOL_USDT",
        package_sha256="c8a97755e3396dd253ba6f9c8b1c3ecebe9dff8c6aacbd86424e1678c3318e23",
        member="gapless_crypto_data/sample_data/binance_spot_SOLUSDT-1h_20220901-20250831_3.0y.csv",
        csv_sha256="572f4366f19e81551f1800c8d8432240da9e218c8e0f52a0f6e278b46045e3c1",
        shipped_rows=26_304,
        true_rows=26_303,
        first="2023-09-01T00:00Z",
        last="2025-08-31T23:00Z",
        rows=17_544,
    ),
)


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def expect(what: str, found: object, wanted: object) -> None:
    """Stop when the input is not the one this script was written for."""
    if found != wanted:
        sys.exit(f"{what} is {found}, expected {wanted}: this is not the pinned file. Get it with\n{HOW_TO_GET}")


def member(package: bytes, name: str) -> bytes:
    """One file out of a wheel (zip) or an sdist (tar.gz)."""
    if zipfile.is_zipfile(io.BytesIO(package)):
        return zipfile.ZipFile(io.BytesIO(package)).read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        found = archive.extractfile(name)
        assert found is not None, name
        return found.read()


def clean(csv: bytes, wrong_days: tuple[str, ...]) -> pd.DataFrame:
    """The cleaning rule of NOTICE: drop rows that carry another hour's candle, give `close_time` its milliseconds back."""
    frame = pd.read_csv(io.BytesIO(csv), comment="#").rename(columns=RENAME)
    frame["timestamp"] = pd.to_datetime(frame["timestamp"], utc=True).dt.as_unit("ms")
    frame["close_time"] = pd.to_datetime(frame["close_time"], utc=True).dt.as_unit("ms")
    filler = frame.duplicated(VALUES, keep="last") & (frame["volume"] > 0)
    filler |= frame["timestamp"].dt.strftime("%Y-%m-%d").isin(wrong_days)
    if wrong_days:  # the BTC file: filler rows inside the outage of February 2018
        filler |= (frame["timestamp"] > "2018-02-08T00:00Z") & (frame["timestamp"] < "2018-02-09T09:28Z")
    frame = frame[~filler]
    whole = frame["close_time"] == frame["timestamp"] + HOUR - pd.Timedelta(seconds=1)
    frame["close_time"] = frame["close_time"].where(~whole, frame["timestamp"] + HOUR - pd.Timedelta(milliseconds=1))
    frame["trades"] = frame["trades"].astype("int64")
    return frame[COLUMNS].reset_index(drop=True)


def write(frame: pd.DataFrame, path: Path) -> None:
    """Parquet, small: each column in the encoding that packs it best."""
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(
        {"label": "historical sample", "origin": "see NOTICE beside this file"}
    )
    delta = {"timestamp": "DELTA_BINARY_PACKED", "close_time": "DELTA_BINARY_PACKED", "trades": "DELTA_BINARY_PACKED"}
    encoding = delta | {name: "BYTE_STREAM_SPLIT" for name in VALUES if name != "trades"}
    pq.write_table(table, path, compression="zstd", compression_level=22, use_dictionary=False, column_encoding=encoding)


def main() -> None:
    """Verify, clean, cut, write; print the hashes that NOTICE names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs=2, type=Path, help="the 2.5.0 sdist and the 2.0.1 wheel")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="folder to write to (default: beside this script)")
    args = parser.parse_args()
    packages = {sha256(data): data for data in (path.read_bytes() for path in args.package)}
    args.to.mkdir(parents=True, exist_ok=True)
    for cut in CUTS:
        if cut.package_sha256 not in packages:
            sys.exit(f"No given file has the sha256 {cut.package_sha256} ({cut.pair}). Get the packages with\n{HOW_TO_GET}")
        csv = member(packages[cut.package_sha256], cut.member)
        expect(f"sha256 of {cut.member}", sha256(csv), cut.csv_sha256)
        frame = clean(csv, cut.wrong_days)
        expect(f"{cut.pair} rows after cleaning", len(frame), cut.true_rows)
        frame = frame[frame["timestamp"].between(pd.Timestamp(cut.first), pd.Timestamp(cut.last))].reset_index(drop=True)
        expect(f"{cut.pair} rows in the cut", len(frame), cut.rows)
        path = args.to / f"{cut.pair}-1h.parquet"
        write(frame, path)
        print(f"{path.name}: {len(frame):,} rows, {path.stat().st_size:,} bytes, sha256 {sha256(path.read_bytes())}")


if __name__ == "__main__":
    main()
