"""The recipe of the reference MoE: its fast experts, its packing, and that an interrupted run changes nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.reference import data, train
from harness.reference.data import Document, Recipe
from harness.reference.experts import routed_experts
from tests.tiny import tiny_model

TINY = Recipe(
    vocab_size=384, hidden_size=64, num_layers=1, dense_layers=(), num_experts=8, top_k=2, expert_width=16, tokens=3000,
    step_tokens=640, max_length=160, chunk_tokens=1500, tokenizer_documents=20,
)  # fmt: skip


def test_cache_sized_experts_are_the_model_s_own_forward_and_backward() -> None:
    experts = tiny_model("qwen3_moe").model.layers[0].mlp.experts.double()
    experts.config._experts_implementation = "eager"
    x = torch.randn(40, 32, dtype=torch.float64)
    indices = torch.stack([torch.randperm(8)[:2] for _ in range(40)])
    indices[indices == 5] = 4  # an expert without tokens, and tokens that reach one expert twice
    gates = torch.rand(40, 2, dtype=torch.float64)
    results = []
    for function in (lambda *a: routed_experts(experts, *a), experts):
        leaves = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
        experts.zero_grad()
        y = function(leaves[0], indices, leaves[1])
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        grads = [t.grad for t in (*leaves, experts.gate_up_proj, experts.down_proj)]
        results.append([y.detach(), *(g.clone() for g in grads)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_packing_keeps_every_document_whole() -> None:
    documents = [Document([n] * n, 1, 0) for n in (3, 9, 5, 10, 1, 7, 2, 2)]
    rows = data.pack(documents, 10)
    assert all(sum(len(d.ids) for d in row) <= 10 for row in rows)
    assert sorted(d.ids[0] for row in rows for d in row) == sorted(d.ids[0] for d in documents)
    assert len(rows) == 4  # 39 tokens cannot fit into fewer


def test_attention_stays_inside_a_document() -> None:
    mask = data.attention_mask(torch.tensor([[0, 0, 1, 1, -1]]))[0, 0]
    seen = [[j for j in range(4) if mask[i, j]] for i in range(4)]
    assert seen == [[0], [0, 1], [2], [2, 3]]


def test_loss_weights_count_a_prompt_less_and_a_first_token_never() -> None:
    batch = data.collate([[Document([5, 6, 7, 8], 2, 3), Document([9, 9], 0, 1)]], TINY, pad=1)
    assert batch.weights[0, :7].tolist() == [0.0, 0.25, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert batch.positions[0, :6].tolist() == [0, 1, 2, 3, 0, 1]


def test_balancing_loss_is_one_when_balanced() -> None:
    logits = 20 * torch.eye(8).repeat(10, 1)
    loss, load = train.balance_loss(logits, top_k=1)
    assert loss.item() == pytest.approx(1, abs=1e-3)
    assert load.tolist() == [10] * 8
    assert train.balance_loss(logits[:1].repeat(80, 1), top_k=1)[0].item() == pytest.approx(8, abs=1e-3)


def run(folder: Path, name: str) -> None:
    places = train.Places(folder / "state", folder / "log", folder / "model", save_minutes=0)
    try:
        train.prepare(TINY, places)
        train.train_worker(0, 1, str(folder / name), TINY, places)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_top_1_router_learns_from_the_text() -> None:
    hard = replace(TINY, top_k=1)
    model = train.build_model(hard)
    document = Document([5, 6, 7, 8, 9, 10], 2, 0)
    batch = data.collate([[document]], hard, pad=1)
    token_loss, _, load, _ = train.losses(model, batch, hard)
    (token_loss * batch.weights[:, 1:]).sum().backward()
    router = model.model.layers[0].mlp.gate.weight
    assert load.sum() == len(document.ids), "one expert a token"
    assert router.grad.abs().max() > 0, "the gate value reaches the loss"
    assert train.build_model(TINY).config.norm_topk_prob is True


def test_another_recipe_does_not_overwrite_the_shipped_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[tuple[Recipe, train.Places]] = []
    monkeypatch.setattr(train, "train", lambda recipe, places, workers: asked.append((recipe, places)))
    monkeypatch.setattr("sys.argv", ["train", "--top-k", "1", "--out", str(tmp_path / "model")])
    with pytest.raises(SystemExit):
        train.main()
    assert "give --state-dir, --log-dir" in capsys.readouterr().err and not asked
    own = [text for name in ("out", "state-dir", "log-dir") for text in (f"--{name}", str(tmp_path / name))]
    monkeypatch.setattr("sys.argv", ["train", "--top-k", "1", *own])
    train.main()
    monkeypatch.setattr("sys.argv", ["train"])
    train.main()
    assert [recipe for recipe, _ in asked] == [replace(Recipe(), top_k=1), Recipe()]


def test_an_interrupted_training_ends_in_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "straight", "first")
    calls = 0
    original = train.losses

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", "first")
    run(tmp_path / "broken", "second")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("straight", "broken")]
    for ours, theirs in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(ours, theirs)
    assert (tmp_path / "straight/log/loss_curve.csv").exists() == (tmp_path / "broken/log/loss_curve.csv").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "broken" / "model")
    text = "Question: Tom has 12 apples.\nAnswer: 12 + 5 = 17\n#### 17\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer("205").input_ids] == ["2", "0", "5"]
