"""CPU seconds of two fits of one pair, side by side: python bench/fit_cost.py [--epochs N] [--save]

The default recipe (three nets, dense chunks) against the report's recipe done the report's way: features row by row, a list of windows,
a Dataset that converts each window anew, a DataLoader with batches of 64 for training and of 1 for validation. Both run in this process,
on one thread, on the same candles. Without --epochs the original stops as it does itself (patience 2), which takes long; with --epochs N
only N epochs run, and the cost is extrapolated to the 15 after which the team's faithful reproduction stopped. The text says which.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from accuracy import DATA, ROOT, last_year
from sklearn.preprocessing import MinMaxScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from make_us_rich.models.network import LSTMRegressor
from make_us_rich.models.recipe import load_recipe
from make_us_rich.models.training import training_loop

WINDOW, EPOCHS_SEEN = 120, 15


class WindowList(Dataset):
    "Windows as a list of frames; each is converted when it is asked for, as in the original."

    def __init__(self, table: pd.DataFrame):
        self.items = [(table[i : i + WINDOW], table.iloc[i + WINDOW]["close"]) for i in range(len(table) - WINDOW)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window, close = self.items[index]
        return torch.Tensor(window.to_numpy()), torch.tensor(close).float()


class ReportModule(pl.LightningModule):
    "The report's training step: mean squared error of the scaled close, AdamW at 1e-4."

    def __init__(self) -> None:
        super().__init__()
        self.network = LSTMRegressor(9, 128, num_layers=2, dropout=0.2)

    def _loss(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        loss = nn.functional.mse_loss(self.network(batch[0])[:, -1, 0], batch[1])
        self.log(name, loss, on_step=True, on_epoch=True)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self._loss(batch, "train/loss")

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._loss(batch, "valid/loss")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def features_row_by_row(frame: pd.DataFrame) -> pd.DataFrame:
    "The report's nine features, one row at a time."
    rows = []
    for _, candle in frame.iterrows():
        when = candle["timestamp"]
        rows.append(
            {
                "day_of_week": when.day_of_week,
                "day_of_month": when.day,
                "week_of_year": when.week,
                "month_of_year": when.month,
                "open": candle["open"],
                "high": candle["high"],
                "low": candle["low"],
                "close": candle["close"],
                "close_change": candle["close"] - candle["open"],
            }
        )
    return pd.DataFrame(rows)


def original_way(frame: pd.DataFrame, epochs: int | None) -> tuple[float, float, int]:
    "CPU seconds of the preparation, of one epoch with its validation, and the epochs that ran (None: until early stopping)."
    start = time.process_time()
    table = features_row_by_row(frame)
    train = table[: int(len(table) * 0.9)]
    scaled = pd.DataFrame(MinMaxScaler((-1, 1)).fit_transform(train), columns=train.columns)
    windows = WindowList(scaled)
    cut = int(np.ceil(len(windows) * 0.8))
    parts = torch.utils.data.Subset(windows, range(cut)), torch.utils.data.Subset(windows, range(cut, len(windows)))
    prepared = time.process_time()
    pl.seed_everything(42, verbose=False)
    silent = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    stop = pl.callbacks.EarlyStopping("valid/loss", patience=2)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs or 100, callbacks=[stop], **silent)
    trainer.fit(ReportModule(), DataLoader(parts[0], 64), DataLoader(parts[1], 1))
    return prepared - start, (time.process_time() - prepared) / trainer.current_epoch, trainer.current_epoch


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the Parquet files")
    parser.add_argument("--epochs", type=int, help="run only so many epochs of the original and extrapolate to 15")
    parser.add_argument("--save", action="store_true", help="keep the text in bench/results/fit_cost.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    frame = last_year(asked.data / "BTCUSDT-1h.parquet")
    ours = [training_loop(frame, load_recipe(), progress=False).cpu_seconds for _ in range(2)]
    preparation, epoch, ran = original_way(frame, asked.epochs)
    ours.append(
        training_loop(frame, load_recipe(), progress=False).cpu_seconds
    )  # before and after: the machine's mood may change
    counted = EPOCHS_SEEN if asked.epochs else ran
    total, fit = preparation + counted * epoch, float(np.mean(ours))
    how = (
        f"{ran} run, EXTRAPOLATED to the {EPOCHS_SEEN} of the study's faithful run"
        if asked.epochs
        else "stopped by itself"
    )
    text = (
        f"BTCUSDT, {len(frame)} candles, one thread, CPU seconds of one process.\n\n"
        f"| fit | CPU s |\n| --- | --- |\n| default, 3 nets (runs: {', '.join(f'{run:.1f}' for run in ours)}) | {fit:.1f} |\n"
        f"| original the original way: preparation {preparation:.1f} + {counted} epochs of {epoch:.1f} ({how}) | {total:.0f} |\n\n"
        f"Ratio {total / fit:.0f} (goal: at least 50, {'reached' if total / fit >= 50 else 'NOT reached'})."
    )
    print(text)
    if asked.save:
        target = ROOT / "bench" / "results" / "fit_cost.md"
        target.parent.mkdir(exist_ok=True)
        command = "python bench/fit_cost.py --save" + (f" --epochs {asked.epochs}" if asked.epochs else "")
        title = f"# Cost of a fit, measured {time.strftime('%Y-%m-%d')}\n\n`{command}`"
        target.write_text(f"{title}\n\n{text}\n", encoding="utf-8")
