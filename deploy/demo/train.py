"""Train the demo model on this machine's CPU within a budget of minutes, then export it.

    python train.py --minutes 75                 # and a few more of compiling; resumes what it finds
    python train.py --export-only                # publish the last saved state, while training goes on

The schedule follows the time spent in steps, not the clock: a paused process (SIGSTOP) finds its place again, and a
slower machine makes fewer steps but ends with the learning rate at zero all the same.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from data import Stream, load_corpus
from export import export
from model import DemoConfig, DemoModel, Gate
from optimizer import Optimizer
from tokenizers import Tokenizer

TOKENS_PER_STEP = 4096
CHAT_SHARE = 0.12  # of the training tokens
BALANCE_RATE = 0.003  # step of the gate's correction bias (the report's gamma; larger here, as the run is short)
STATE_EVERY_S, LOG_EVERY_S = 300, 30
# Read by libraries when the process starts, so `main` restarts itself with them.
ENVIRONMENT = {
    # glibc returns large blocks to the kernel and faults them in again at every step: keeping them saved about 13 %.
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    # A thread that waits for its sibling should soon give up the core: on a shared machine the sibling may need it.
    "GOMP_SPINCOUNT": "3000",
}
SLOW_STEP = 5  # times the median: anything longer was a pause or a compilation, and is not charged


class Phase(NamedTuple):
    until: float  # share of the budget at which the phase ends
    sequence_length: int
    round_to_fp8: bool


# Short windows first: attention is a third of the cost of a step at 1024. The last ones give the context its length.
PHASES = [Phase(0.55, 512, False), Phase(0.88, 1024, False), Phase(0.90, 4096, False), Phase(1.01, 4096, True)]


def compute_phase(progress: float) -> Phase:
    return next(phase for phase in PHASES if progress < phase.until)


def compute_rate(progress: float) -> float:
    """Share of the full learning rate: warm-up, plateau, then linearly to zero."""
    return max(0.0, min(1.0, (progress + 0.001) / 0.02, (1.0 - progress) / 0.55))


def compute_mtp_weight(progress: float) -> float:
    """The report lowers the weight of the MTP loss from 0.3 to 0.1 for the last third."""
    return 0.3 if progress < 0.7 else 0.1


class Batches:
    """Windows of source code, and in CHAT_SHARE of the rows windows of conversations."""

    def __init__(self, documents: list[np.ndarray], chats: list[np.ndarray], seed: int):
        self.streams = [Stream(documents, seed), Stream(chats, seed + 1)]
        self.chat_debt = 0.0  # rows of chat owed: short steps cannot hold exactly the share

    def take_(self, sequence_length: int) -> torch.Tensor:
        """[TOKENS_PER_STEP / sequence_length, sequence_length + 2] int64."""
        num_rows = TOKENS_PER_STEP // sequence_length
        self.chat_debt += num_rows * CHAT_SHARE
        num_chats = min(int(self.chat_debt), num_rows)
        self.chat_debt -= num_chats
        rows = [self.streams[row < num_chats].take_(sequence_length) for row in range(num_rows)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


class Trainer:
    def __init__(self, config: DemoConfig, batches: Batches, budget_s: float, seed: int):
        self.model = DemoModel(config)
        self.model.init_weights_(torch.Generator().manual_seed(seed))
        self.optimizer = Optimizer(self.model)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        self.gates = [module for module in self.model.modules() if isinstance(module, Gate)]
        self.compiled = torch.compile(self.model, dynamic=False)
        self.batches = batches
        self.budget_s = budget_s
        self.num_steps = self.num_tokens = 0
        self.spent_s = 0.0
        self.recent_s: deque[float] = deque(maxlen=50)

    @property
    def progress(self) -> float:
        return self.spent_s / self.budget_s

    def step_(self) -> tuple[float, float, torch.Tensor]:
        """One update. Returns the loss, the MTP loss and the loads [num MoE layers + 1, n_routed_experts]."""
        started = time.perf_counter()
        progress, phase, rate = self.progress, compute_phase(self.progress), compute_rate(self.progress)
        loss, mtp_loss, loads = self.compiled(self.batches.take_(phase.sequence_length))
        (loss + compute_mtp_weight(progress) * mtp_loss).backward()
        self.optimizer.step_(rate)
        self.optimizer.publish_(phase.round_to_fp8)
        # Auxiliary-loss-free balancing (DeepSeek-V3 report, section 2.1.2): raise the bias of the underloaded.
        for gate, load in zip(self.gates, loads.float(), strict=True):
            gate.e_score_correction_bias += BALANCE_RATE * min(1.0, 2 * rate) * torch.sign(load.mean() - load)
        self._charge(time.perf_counter() - started)
        self.num_steps += 1
        self.num_tokens += TOKENS_PER_STEP
        return loss.item(), mtp_loss.item(), loads

    def _charge(self, step_s: float) -> None:
        if self.recent_s:
            self.spent_s += min(step_s, SLOW_STEP * statistics.median(self.recent_s))
        if self.num_steps > 0:  # the first step compiles: it is no measure
            self.recent_s.append(step_s)

    def model_state(self) -> dict[str, torch.Tensor]:
        """Masters and correction biases, by DemoModel's names, in float32."""
        return {name: self.optimizer.masters.get(name, value) for name, value in self.model.state_dict().items()}

    def state(self) -> dict:
        return {
            "model": self.model_state(),
            "optimizer": self.optimizer.state(),
            "streams": [stream.num_taken for stream in self.batches.streams],
            "counts": (self.num_steps, self.num_tokens, self.spent_s, self.budget_s),
        }

    def load_state_(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_(state["optimizer"])
        self.num_steps, self.num_tokens, self.spent_s, _ = state["counts"]
        for stream, saved in zip(self.batches.streams, state["streams"], strict=True):
            stream.num_taken = saved
        self.optimizer.publish_(compute_phase(self.progress).round_to_fp8)


def save(state: dict, file: Path) -> None:
    torch.save(state, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def publish(folder: Path, state_folder: Path, state: dict) -> None:
    """Export a saved state and note beside it how it was made; evaluate.py adds the figures."""
    config = DemoConfig()
    tokenizer = Tokenizer.from_file(str(state_folder / "tokenizer.json"))
    export(folder / "checkpoint", config, state["model"], tokenizer, config.max_position_embeddings)
    num_steps, num_tokens, spent_s, budget_s = state["counts"]
    training = {
        "training_minutes": round(spent_s / 60, 1),
        "finished": spent_s >= budget_s,
        "steps": num_steps,
        "tokens_seen": num_tokens,
        "tokens_per_second": round(num_tokens / max(spent_s, 1e-9)),
    }
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n")


def train(trainer: Trainer, state_folder: Path) -> None:
    with (state_folder / "log.jsonl").open("a", buffering=1) as log:
        run_steps(trainer, state_folder, log)
    save(trainer.state(), state_folder / "state.pt")


def run_steps(trainer: Trainer, state_folder: Path, log: TextIO) -> None:
    """Until the budget is spent; a log line and a state from time to time."""
    saved_at = logged_at = time.monotonic()
    interval: list[tuple[float, float]] = []
    loads: torch.Tensor | int = 0
    while trainer.progress < 1.0:
        loss, mtp_loss, step_loads = trainer.step_()
        interval.append((loss, mtp_loss))
        loads = loads + step_loads
        now = time.monotonic()
        if now - logged_at > LOG_EVERY_S:
            mean_loss, mean_mtp_loss = np.mean(interval, 0)
            imbalance = loads.max(-1).values / loads.float().mean(-1)
            log.write(
                json.dumps(
                    {
                        "step": trainer.num_steps,
                        "tokens": trainer.num_tokens,
                        "progress": round(trainer.progress, 4),
                        "loss": round(float(mean_loss), 4),
                        "mtp_loss": round(float(mean_mtp_loss), 4),
                        "tokens_per_s": round(TOKENS_PER_STEP * len(interval) / (now - logged_at)),
                        "load_max_over_mean": [round(value, 2) for value in imbalance.tolist()],
                        "length": compute_phase(trainer.progress - 1e-9).sequence_length,
                    }
                )
                + "\n"
            )
            interval, loads, logged_at = [], 0, now
        if now - saved_at > STATE_EVERY_S:
            save(trainer.state(), state_folder / "state.pt")
            saved_at = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=75, help="time to spend in training steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    state_folder = Path(tempfile.gettempdir()) / "demo-train"
    parser.add_argument("--state", type=Path, default=state_folder, help="folder of resumable state and log")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder that gets checkpoint/")
    parser.add_argument("--export-only", action="store_true", help="publish the last saved state and end")
    arguments = parser.parse_args()
    state_file = arguments.state / "state.pt"
    torch.set_num_threads(arguments.threads)
    if arguments.export_only:
        publish(arguments.out, arguments.state, torch.load(state_file, weights_only=True))
        return
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    arguments.state.mkdir(parents=True, exist_ok=True)
    (arguments.state / "pid").write_text(f"{os.getpid()}\n")
    config = DemoConfig()
    tokenizer_file = arguments.state / "tokenizer.json"
    known_tokenizer = Tokenizer.from_file(str(tokenizer_file)) if state_file.exists() else None
    corpus = load_corpus(config.vocab_size, arguments.seed, known_tokenizer)
    corpus.tokenizer.save(str(tokenizer_file))
    batches = Batches(corpus.documents, corpus.chats, arguments.seed)
    trainer = Trainer(config, batches, arguments.minutes * 60, arguments.seed)
    if state_file.exists():
        trainer.load_state_(torch.load(state_file, weights_only=True))
    else:
        save(trainer.state(), state_file)
    train(trainer, arguments.state)
    publish(arguments.out, arguments.state, torch.load(state_file, weights_only=True))


if __name__ == "__main__":
    main()
