"""Train the reference MoE from scratch: ``python -m harness.reference.train --help``.

Everything is drawn from seeds. The run saves its state every few minutes and goes on from there when it is started
again; loss curve and routing statistics go to ``--log-dir``, the finished model (bf16, hub layout) to ``--out``.
``--variant`` trains models of the panel (variants.py) one after the other, into folders of their own; finished ones are
skipped.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from harness.files import write_files
from harness.reference import MODEL_FOLDER
from harness.reference.data import Batch, attention_mask, chunk_rows, collate, train_tokenizer
from harness.reference.models import balance_loss, build_model, move_bias, routers, watch_routers
from harness.reference.recipe import Recipe
from harness.reference.variants import LOG_FOLDER, PANEL_FOLDER, VARIANTS, recipe_of, weights_folder


def losses(
    model: PreTrainedModel, seen: list[tuple[torch.Tensor, torch.Tensor]], batch: Batch, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(language loss per token (B, S-1), balancing loss, load (layers, E), the mask of real tokens (B, S)).

    ``seen`` is what ``watch_routers(model)`` fills.
    """
    seen.clear()
    output = model.model(
        input_ids=batch.ids,
        attention_mask=attention_mask(batch.segments),
        position_ids=batch.positions,
        use_cache=False,
    )
    real = batch.segments >= 0
    balance = [balance_loss(recipe, logits, chosen, real) for logits, chosen in seen]
    logits = model.lm_head(output.last_hidden_state[:, :-1])
    token_loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none")
    return (
        token_loss.view(batch.ids.shape[0], -1),
        torch.stack([b for b, _ in balance]).mean(),
        torch.stack([load for _, load in balance]),
        real,
    )


def learning_rate(recipe: Recipe, tokens: int) -> float:
    """Linear warm-up, constant, then linear decay to a hundredth over the last ``decay`` of the tokens."""
    done = tokens / recipe.tokens
    ramp = min(1.0, (done + 1e-4) / recipe.warmup)
    return recipe.learning_rate * min(ramp, max(0.01, (1 - done) / recipe.decay))


def optimizer_for(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def routing_statistics(load: torch.Tensor) -> dict[str, float]:
    """From (layers, E) token counts: share of the most used quarter of the experts, and the least used expert's load
    as a share of the mean."""
    ordered = load.double().sort(dim=1, descending=True).values
    share = ordered[:, : load.shape[1] // 4].sum(1) / ordered.sum(1)
    return {
        "top_quarter_share": share.mean().item(),
        "least_load": (ordered[:, -1] / ordered.mean(1)).min().item(),
        "unused_experts": int((load == 0).sum()),
    }


@dataclass(frozen=True)
class Places:
    """``state_dir``: to resume from; ``log_dir``: loss curve and recipe; ``out``: the finished model."""

    state_dir: Path
    log_dir: Path
    out: Path
    save_minutes: float


def sum_over_workers(tensors: list[torch.Tensor]) -> None:
    """Replace every tensor by its sum over the worker processes."""
    if dist.get_world_size() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def train_worker(rank: int, workers: int, rendezvous: str, recipe: Recipe, places: Places) -> None:
    """One of ``workers`` single-threaded processes: each takes its share of every step's rows, gradients are summed.

    On a small shared machine this is far faster than one process with as many threads, because the workers wait for
    each other once a step and not once an operation.
    """
    torch.set_num_threads(1)
    parent = os.getppid()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(places.state_dir / "tokenizer")
    model = build_model(recipe)
    seen = watch_routers(model)
    parameters = list(model.parameters())
    optimizer = optimizer_for(model, recipe)
    state = {"tokens": 0, "chunk": 0, "row": 0, "seconds": 0.0}
    checkpoint = places.state_dir / "state.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        state = saved["state"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    curve = places.log_dir / "loss_curve.csv"
    if rank == 0:
        (places.log_dir / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        _cut_curve(curve, int(state["tokens"]))
    dist.barrier()

    def save() -> None:
        if rank == 0:
            whole = {"state": state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write_files({checkpoint: partial(torch.save, whole)})

    rows_per_step = recipe.step_tokens // recipe.max_length
    names = [name for name, _ in recipe.shares]
    bar = tqdm(
        total=recipe.tokens,
        initial=int(state["tokens"]),
        unit="tok",
        unit_scale=True,
        disable=rank > 0,
        mininterval=0.1 if sys.stderr.isatty() else 60,  # a line a minute in a log
    )
    last_save, step = time.monotonic(), 0
    logged = StepLog.empty(recipe)
    while state["tokens"] < recipe.tokens:
        rows = chunk_rows(tokenizer, recipe, int(state["chunk"]))
        while state["row"] + rows_per_step <= len(rows) and state["tokens"] < recipe.tokens:
            if os.getppid() != parent:
                raise SystemExit("the training's main process is gone")  # a killed run must not write on
            started = time.monotonic()
            first = int(state["row"])
            batch = collate(rows[first : first + rows_per_step][rank::workers], recipe, tokenizer.pad_token_id)
            rate = learning_rate(recipe, int(state["tokens"]))
            for group in optimizer.param_groups:
                group["lr"] = rate
            token_loss, balance, load, real = losses(model, seen, batch, recipe)
            weights = batch.weights[:, 1:]
            loss = (token_loss * weights).sum() / recipe.step_tokens
            (loss + recipe.balance * balance / workers).backward()
            log = StepLog.of(token_loss.detach(), batch, load, real, len(names))
            sum_over_workers([p.grad for p in parameters if p.grad is not None])
            sum_over_workers([log.values])
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            move_bias(model, log.load, int(state["tokens"]) / recipe.tokens)
            logged.values += log.values
            state["tokens"] += log.tokens
            state["row"] += rows_per_step
            state["seconds"] += time.monotonic() - started
            bar.update(log.tokens)
            step += 1
            if rank == 0 and step % 25 == 0:
                line = {
                    "tokens": state["tokens"],
                    "seconds": round(float(state["seconds"])),
                    "learning_rate": f"{rate:.2e}",
                }
                line |= {key: f"{value:.4f}" for key, value in logged.summary(names).items()}
                bar.set_postfix({name: line[name] for name in names})
                _append(curve, line)
                logged = StepLog.empty(recipe)
            if time.monotonic() - last_save > 60 * places.save_minutes:
                save()
                last_save = time.monotonic()
        if state["row"] + rows_per_step > len(rows):  # what is left of a chunk is no whole step
            state["chunk"], state["row"] = int(state["chunk"]) + 1, 0
    save()
    bar.close()
    if rank == 0:
        export(model, tokenizer, places.out)
    dist.destroy_process_group()


@dataclass
class StepLog:
    """Counts of some steps in one flat vector, so that workers can add them up: tokens, loss and number of answer
    tokens by domain, load (layers x experts)."""

    values: torch.Tensor
    domains: int
    layers: int

    @staticmethod
    def empty(recipe: Recipe) -> "StepLog":
        size = 1 + 2 * len(recipe.shares) + recipe.moe_layers * recipe.num_experts
        return StepLog(torch.zeros(size, dtype=torch.float64), len(recipe.shares), recipe.moe_layers)

    @staticmethod
    def of(token_loss: torch.Tensor, batch: Batch, load: torch.Tensor, real: torch.Tensor, domains: int) -> "StepLog":
        answers = batch.weights[:, 1:] == 1.0
        domain = batch.domains[:, 1:][answers]
        parts = [
            real.sum()[None],
            torch.bincount(domain, token_loss[answers].double(), minlength=domains),
            torch.bincount(domain, minlength=domains),
            load.flatten(),
        ]
        return StepLog(torch.cat([p.double() for p in parts]), domains, load.shape[0])

    @property
    def tokens(self) -> int:
        return int(self.values[0])

    @property
    def load(self) -> torch.Tensor:
        """Tokens by (layer, expert)."""
        return self.values[1 + 2 * self.domains :].view(self.layers, -1)

    def summary(self, names: list[str]) -> dict[str, float]:
        """Loss on the answers by domain, and the routing statistics."""
        loss, count = self.values[1 : 1 + 2 * self.domains].view(2, -1)
        return dict(zip(names, (loss / count).tolist(), strict=True)) | routing_statistics(self.load)


def prepare(recipe: Recipe, places: Places) -> None:
    """Make the folders and, at the first start, the tokenizer."""
    for folder in (places.state_dir, places.log_dir):
        folder.mkdir(parents=True, exist_ok=True)
    if not (places.state_dir / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(recipe).save_pretrained(places.state_dir / "tokenizer")


def train(recipe: Recipe, places: Places, workers: int) -> None:
    prepare(recipe, places)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train_worker, (workers, os.path.join(folder, "rendezvous"), recipe, places), nprocs=workers)


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bf16 and its tokenizer in the hub layout, whole or not at all."""
    biases = [getattr(router, "e_score_correction_bias", None) for router in routers(model)]
    model.bfloat16()
    for router, bias in zip(routers(model), biases, strict=True):
        if bias is not None:  # float32 in published checkpoints as well: a step of training is less than bf16 resolves
            router.e_score_correction_bias = bias.float()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder)
        model.save_pretrained(made)
        config = json.loads((made / "config.json").read_text())
        if "num_local_experts" in config:
            # Published Qwen3-MoE configs say num_experts; transformers 5 writes the other name only.
            config["num_experts"] = config["num_local_experts"]
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(made)
        # config.json last: a folder that has one is a finished model.
        names = sorted((path.name for path in made.iterdir()), key=lambda name: name == "config.json")
        write_files({out / name: (made / name).read_bytes() for name in names})


def _append(path: Path, line: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, line)
        if new:
            writer.writeheader()
        writer.writerow(line)


def _cut_curve(path: Path, tokens: int) -> None:
    """Drop what an interrupted run logged after its last saved state, so that the curve has no point twice."""
    if path.exists():
        header, *lines = path.read_text().splitlines()
        kept = [line for line in lines if int(line.split(",")[0]) <= tokens]
        path.write_text("\n".join([header, *kept]) + "\n")


def train_variants(names: list[str], workers: int, save_minutes: float) -> None:
    """Train models of the panel one after the other; those whose weights are there are left alone."""
    for name in names:
        recipe, out = recipe_of(name), weights_folder(name)
        if (out / "config.json").exists():
            print(f"{time.strftime('%F %T')} {name}: its weights are at {out}", flush=True)
            continue
        print(f"{time.strftime('%F %T')} {name}: {VARIANTS[name].what}", flush=True)
        train(recipe, Places(PANEL_FOLDER / name / "state", LOG_FOLDER / name, out, save_minutes), workers)
        print(f"{time.strftime('%F %T')} {name}: done, {out}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m harness.reference.train", description=__doc__)
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), help="models of the panel, one after the other")
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="where the finished model goes")
    parser.add_argument("--state-dir", type=Path, default=LOG_FOLDER / "state", help="to resume from")
    parser.add_argument("--log-dir", type=Path, default=LOG_FOLDER, help="loss curve, recipe")
    parser.add_argument("--save-minutes", type=float, default=4.0, help="time between saved states")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    dense = list(Recipe().dense_layers)
    parser.add_argument("--dense-layers", type=int, nargs="*", default=dense, help="layers with a dense MLP instead")
    for name, default in asdict(Recipe()).items():
        if isinstance(default, int | float):
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}"
            )
    options = vars(parser.parse_args())
    workers, variants = options.pop("workers"), options.pop("variant")
    options["dense_layers"] = tuple(options.pop("dense_layers"))
    places = Places(*(options.pop(name) for name in ("state_dir", "log_dir", "out", "save_minutes")))
    recipe = Recipe(**options)
    folders = {name: getattr(places, name) for name in ("out", "state_dir", "log_dir")}
    taken = [f"--{name.replace('_', '-')}" for name, path in folders.items() if path == parser.get_default(name)]
    if variants:
        if recipe != Recipe() or len(taken) < len(folders):
            parser.error("a variant has its own recipe and folders: give --workers and --save-minutes alone")
        train_variants(variants, workers, places.save_minutes)
        return
    if taken and recipe != Recipe():
        parser.error(f"another recipe than the shipped model's needs folders of its own: give {', '.join(taken)}")
    train(recipe, places, workers)


if __name__ == "__main__":
    main()
