"""`mkrich` as a person meets it: real processes against a replay exchange; exit codes, one sentence, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from make_us_rich.market.candles import SAMPLE_LABEL, fake_candles, load_sample
from make_us_rich.market.replay import ReplayServer
from make_us_rich.market.tape import Faults
from make_us_rich.runs.run import Outcome

MKRICH = str(Path(sys.executable).parent / "mkrich")


@pytest.fixture(scope="module")
def exchange():
    frames = {
        "BTC_USDT": load_sample(),
        "NEW_USDT": fake_candles(120, start="2023-12-27"),
    }  # the last candle is open: 119 closed
    with ReplayServer(frames, now="2023-12-31T23:30Z", label=SAMPLE_LABEL) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def mkrich(*args, home, url="", **env):
    "Run the command; asserts that no traceback is shown and that every failure says something."
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MUR_")}
    environment |= {
        "MUR_HOME": str(home / "store"),
        "MUR_RUNS": str(home / "runs"),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    environment |= ({"MUR_EXCHANGE_URL": url} if url else {}) | env
    done = subprocess.run([MKRICH, *args], env=environment, capture_output=True, text=True, cwd=home)
    assert "Traceback" not in done.stdout + done.stderr or "--debug" in args, done.stderr
    if done.returncode not in (0, 4):
        assert done.stderr.strip() or "fail" in done.stdout
    return done


@pytest.fixture(scope="module")
def trained(exchange, home):
    "One real training by the real run notebook, one member to be quick."
    return mkrich("train", "BTC_USDT", "--set", "members=1", home=home, url=exchange.url)


def test_train_publishes(trained, home):
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "BTC_USDT published 20231231T230000Z-" in trained.stdout
    assert ": Training" in trained.stderr and ": Verdict" in trained.stderr
    (report,) = (home / "runs" / "BTC_USDT").glob("*/train.ipynb")
    page = json.loads(report.read_text())
    text = json.dumps(page)
    assert "# BTC_USDT, 1h, cut-off 2023-12-31 23:00 UTC" in text and "historical sample" in text
    assert sum("image/png" in o.get("data", {}) for c in page["cells"] for o in c.get("outputs", [])) == 6
    assert not [o for c in page["cells"] for o in c.get("outputs", []) if o.get("name") == "stderr"]


def test_again_is_skipped_and_one_bad_pair_stops_no_other(trained, exchange, home):
    done = mkrich("train", "NOSUCH_USDT", "btc/usdt", "--set", "members=1", home=home, url=exchange.url)
    assert done.returncode == 3 and done.stderr.count("mkrich: ") == 1 and "NOSUCH" in done.stderr
    assert (
        "BTC_USDT skipped 20231231T230000Z-" in done.stdout
        and "no closed candle after 2023-12-31T23:00:00Z and the same recipe" in done.stdout
    )
    listed = mkrich("runs", home=home, COLUMNS="200").stdout.splitlines()[1:]
    assert (
        [line.split()[3] for line in listed] == ["NOSUCH_USDT", "BTC_USDT"]
        and "no_data: " in listed[0]
        and " published " in listed[1]
    )


def test_the_page_of_a_run(trained, home):
    (page,) = (home / "runs" / "BTC_USDT").glob("*/train.html")
    assert f"report: {page}" in trained.stdout
    assert "<script" not in page.read_text() and "historical sample" in page.read_text()
    network, har_t = (home / "store" / "models" / "BTC_USDT" / "1h").glob(
        "*/run.html"
    )  # the run published its fallback as well
    assert network.read_bytes() == har_t.read_bytes() == page.read_bytes()
    beside = network
    assert json.loads((beside.parent / "manifest.json").read_text())["page"] == "run.html"
    assert json.loads((page.parent / "outcome.json").read_text())["page"] == str(page)
    shown = mkrich("runs", "--show", "BTC_USDT", home=home, COLUMNS="400")
    assert str(page) in shown.stdout


def test_a_database_that_cannot_be_used_is_one_sentence_and_no_run(exchange, tmp_path):
    (tmp_path / "not a folder").write_text("")
    url = f"sqlite:///{tmp_path}/not a folder/mkrich.db"
    done = mkrich("train", "BTC_USDT", home=tmp_path, url=exchange.url, MUR_DATABASE_URL=url)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("mkrich: the database"), done.stderr
    assert not (tmp_path / "runs" / "BTC_USDT").exists()


def test_forecast_table(trained, exchange, home):
    done = mkrich("forecast", "BTC_USDT", home=home, url=exchange.url)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    wanted = (
        "last close 42,257.88",
        "50 % range",
        "80 % range",
        "95 % range",
        "P(up)",
        "2023-12-31 23:00 to 00:00 UTC",
        "none yet",
    )
    for text in wanted:
        assert text in said, done.stdout
    assert "historical sample" in done.stdout and "\x1b[" not in done.stdout
    narrow = mkrich("forecast", home=home, url=exchange.url, COLUMNS="60")
    assert max(map(len, narrow.stdout.splitlines())) <= 60


def test_forecast_json_agrees_with_the_notebook(trained, exchange, home):
    done = mkrich("forecast", "--json", home=home, url=exchange.url)
    (forecast,) = json.loads(done.stdout)
    assert (forecast["pair"], forecast["status"], forecast["as_of"]) == ("BTC_USDT", "ok", "2023-12-31T23:00:00Z")
    assert len(forecast["quantiles"]) == 21 and 0 < forecast["p_up"] < 1 and forecast["data_age_minutes"] == 30
    (report,) = (home / "runs" / "BTC_USDT").glob("*/train.ipynb")
    assert f"{forecast['median']:,.2f}" in report.read_text()


def test_models_and_rollback(trained, exchange, home):
    done = mkrich("models", home=home)
    assert (
        done.returncode == 0
        and "champion" in done.stdout
        and "passed" in done.stdout
        and "20231231T230000Z-" in done.stdout
    )
    assert "HAR-t" in done.stdout  # the fallback that the pair's first run publishes before its network
    back = mkrich("rollback", "BTC_USDT", home=home)
    assert back.returncode == 0 and "is served by 20231231T230000Z-" in back.stdout
    shown = mkrich("forecast", "BTC_USDT", home=home, url=exchange.url)
    assert shown.returncode == 0 and "It is the fallback HAR-t" in " ".join(shown.stdout.split())
    back = mkrich("rollback", "BTC_USDT", home=home)
    assert back.returncode == 1 and "no earlier champion" in back.stderr


def test_exchange_down_uses_stored_candles_and_their_age(trained, home):
    done = mkrich("forecast", "BTC_USDT", home=home, url="http://127.0.0.1:9")
    assert done.returncode == 3
    assert (
        "no forecast" in done.stdout
        and "days old" in " ".join(done.stdout.split())
        and "MUR_EXCHANGE_URL" in done.stdout
    )


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["train", "§§"], 2, "a pair is a base and a quote asset such as BTC_USDT"),
        (["train", "BTC_USDT", "--set", "hiden_size=3"], 2, "did you mean 'hidden_size'?"),
        (["train", "BTC_USDT", "--set", "hidden_size"], 2, "--set wants NAME=VALUE"),
        (["train", "BTC_USDT", "--histroy-days", "3"], 2, "No such option"),
        (["train", "BTC_USDT", "--deadline", "-1"], 2, "MUR_DEADLINE"),
        (["train"], 2, "Missing argument"),
        (
            ["forecast", "ETH_USDT"],
            3,
            "no model of ETH_USDT 1h is published yet; train one with `mkrich train ETH_USDT`",
        ),
        (["models", "ETH_USDT"], 3, "no model of ETH_USDT is published yet"),
        (["candles", "NOSUCH_USDT"], 3, "NOSUCH"),
        (["rollback", "BTC_USDT", "--to", "yesterday"], 1, "a version looks like"),
        (["replay", "--file", "nothing.csv"], 3, "nothing.csv is no file"),
        (["demo", "--pair", "ETH_USDT"], 3, "the embedded sample holds BTC_USDT and SOL_USDT"),
    ],
)
def test_wrong_input_is_one_sentence(args, code, sentence, exchange, tmp_path):
    done = mkrich(*args, home=tmp_path, url=exchange.url, COLUMNS="200")
    assert (done.returncode, sentence in " ".join((done.stdout + done.stderr).split())) == (code, True), (
        done.stdout + done.stderr
    )
    assert not (tmp_path / "runs" / "BTC_USDT").exists()


def test_119_candles(exchange, tmp_path):  # F25
    done = mkrich("train", "NEW_USDT", home=tmp_path, url=exchange.url)
    assert done.returncode == 3
    assert "119 candles" in done.stdout + done.stderr and "fetch a longer history" in done.stdout + done.stderr


def test_no_network_and_empty_history(exchange, tmp_path):  # F12, F20
    done = mkrich("candles", "BTC_USDT", home=tmp_path, url="http://127.0.0.1:9")
    assert done.returncode == 1 and "MUR_EXCHANGE_URL" in done.stderr and done.stderr.count("mkrich: ") == 1
    exchange.faults = Faults(empty=True)
    try:
        done = mkrich("candles", "BTC_USDT", home=tmp_path, url=exchange.url)
    finally:
        exchange.faults = Faults()
    assert done.returncode == 3 and "no candles" in done.stderr.lower()


def test_misspelt_setting_and_broken_store(exchange, tmp_path):  # F92, F48
    done = mkrich("models", home=tmp_path, MUR_HOMME="/data")
    assert done.returncode == 2 and "MUR_HOMME is not a setting; did you mean MUR_HOME?" in done.stderr
    version = tmp_path / "store" / "models" / "BTC_USDT" / "1h" / "20231231T230000Z-0123456789ab"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(b"half")
    (version.parent / "champion.json").write_bytes(b"{")
    done = mkrich("forecast", "BTC_USDT", home=tmp_path, url=exchange.url)
    assert (
        done.returncode == 1 and "champion.json is damaged" in done.stderr and "mkrich rollback BTC_USDT" in done.stderr
    )
    file = tmp_path / "no folder"
    file.write_text("")
    done = mkrich("models", home=tmp_path, MUR_HOME=str(file))
    assert done.returncode == 1 and "cannot be opened" in done.stderr


def test_unexpected_error_and_debug(tmp_path):
    code = "from make_us_rich.cli import doctor, main; doctor.examine = lambda settings: 1 / 0; main.main(['doctor'{}])"
    for extra, traceback in (("", False), (", '--debug'", True)):
        done = subprocess.run([sys.executable, "-c", code.format(extra)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and ("Traceback" in done.stderr) is traceback
        assert "unexpected ZeroDivisionError: division by zero; run again with --debug" in done.stderr


def test_refused_by_the_gate_is_exit_code_4(monkeypatch, capsys, tmp_path):
    from make_us_rich.cli import main

    refused = Outcome(
        state="refused",
        exit_class="refused",
        reason="The 80 % range held 61.0 % of the hours",
        run_id="r",
        pair="BTC_USDT",
        interval="1h",
        cutoff="",
        recipe="default",
    )
    monkeypatch.setattr("make_us_rich.runs.train.train", lambda *a, **k: refused)
    monkeypatch.setenv("MUR_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        main.main(["train", "BTC_USDT"])
    assert end.value.code == 4
    assert "BTC_USDT refused" in (out := capsys.readouterr().out) and "61.0 %" in out


@pytest.mark.parametrize("command", ["train", "forecast", "models", "rollback", "candles", "replay", "doctor", "demo"])
def test_help_has_examples(command, tmp_path):
    done = mkrich(command, "--help", home=tmp_path, COLUMNS="100")
    assert done.returncode == 0 and f"mkrich {command}" in done.stdout.split("Example")[-1]
    assert "\x1b[" not in done.stdout


def test_doctor(exchange, tmp_path):
    done = mkrich("doctor", home=tmp_path, url=exchange.url)
    assert done.returncode == 0, done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines if line and line[0] in ("ok", "warn")][:4] == [
        "python",
        "libraries",
        "home",
        "disk",
    ]
    done = mkrich("doctor", home=tmp_path, url="http://127.0.0.1:9")
    assert done.returncode == 1 and "fail  exchange" in done.stdout


def test_a_reader_that_stops_is_no_error(trained, home):
    command = f"{MKRICH} models | head -1"
    done = subprocess.run(
        ["bash", "-c", command], env=os.environ | {"MUR_HOME": str(home / "store")}, capture_output=True, text=True
    )
    assert "BrokenPipe" not in done.stderr and done.stdout
