"""The recipe of the reference MoE: its fast experts, its packing, and that an interrupted run changes nothing."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.errors import WinnowError
from harness.reference import MODEL_FOLDER, data, train
from harness.reference.data import Document
from harness.reference.experts import routed_experts
from harness.reference.recipe import Recipe
from harness.reference.variants import VARIANTS, panel_model, recipe_of
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
    documents = [Document([n] * n, [1.0] * n, 0) for n in (3, 9, 5, 10, 1, 7, 2, 2)]
    rows = data.pack(documents, 10)
    assert all(sum(len(d.ids) for d in row) <= 10 for row in rows)
    assert sorted(d.ids[0] for row in rows for d in row) == sorted(d.ids[0] for d in documents)
    assert len(rows) == 4  # 39 tokens cannot fit into fewer


def test_attention_stays_inside_a_document() -> None:
    mask = data.attention_mask(torch.tensor([[0, 0, 1, 1, -1]]))[0, 0]
    seen = [[j for j in range(4) if mask[i, j]] for i in range(4)]
    assert seen == [[0], [0, 1], [2], [2, 3]]


def test_loss_weights_count_a_prompt_less_and_a_first_token_never() -> None:
    documents = [data.document_of([problem], 0, TINY, [4], 3) for problem in (([5, 6], [7]), ([], [9]))]
    assert documents[0].ids == [5, 6, 7, 3]
    batch = data.collate([documents], TINY, pad=1)
    assert batch.weights[0, :7].tolist() == [0.0, 0.25, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert batch.positions[0, :6].tolist() == [0, 1, 2, 3, 0, 1]


def test_solved_examples_stand_before_the_problem_and_are_dropped_where_they_do_not_fit() -> None:
    problems = [([5] * n, [6] * n) for n in (60, 10, 20)]
    document = data.document_of(problems, 2, TINY, [4], 3)  # 60 + 60 tokens more would not fit into 160
    assert document.ids == [5] * 10 + [6] * 10 + [4] + [5] * 20 + [6] * 20 + [3] and document.domain == 2
    assert document.weights == [0.25] * 10 + [1.0] * 10 + [0.0] + [0.25] * 20 + [1.0] * 21
    assert len(data.document_of(problems[:1] * 2, 2, TINY, [4], 3).ids) == 121
    assert len(data.document_of([([5] * 200, [6])], 2, TINY, [4], 3).ids) == TINY.max_length


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_balancing_loss_is_one_when_balanced(family: str) -> None:
    recipe, logits = replace(TINY, family=family), 20 * torch.eye(8).repeat(10, 1) - 10
    real = torch.ones(2, 40, dtype=torch.bool)
    loss, load = train.balance_loss(recipe, logits, logits.topk(1).indices, real)
    assert loss.item() == pytest.approx(1, abs=1e-3)
    assert load.tolist() == [10] * 8
    alike = logits[:1].repeat(80, 1)
    assert train.balance_loss(recipe, alike, alike.topk(1).indices, real)[0].item() == pytest.approx(8, abs=1e-2)
    real[1] = False
    _, half = train.balance_loss(recipe, alike, alike.topk(1).indices, real)
    assert half.tolist() == [40] + [0] * 7


def test_deepseek_s_balancing_loss_is_that_of_its_report() -> None:
    recipe, generator = replace(TINY, family="deepseek_v3"), torch.Generator().manual_seed(0)
    logits = torch.randn(24, 8, generator=generator, dtype=torch.float64)
    real = torch.ones(3, 8, dtype=torch.bool)
    real[1, 5:] = False
    chosen = logits.topk(2).indices
    expected = []
    for row in range(3):  # equations 17 to 20, one sum at a time
        places = [8 * row + t for t in range(8) if real[row, t]]
        total = 0.0
        for expert in range(8):
            f = sum(8 / (2 * len(places)) for t in places if expert in chosen[t])
            p = sum((logits[t].sigmoid()[expert] / logits[t].sigmoid().sum()).item() for t in places) / len(places)
            total += f * p
        expected.append(total)
    ours, _ = train.balance_loss(recipe, logits, chosen, real)
    assert ours.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_the_correction_bias_goes_up_for_idle_experts_and_stands_still_at_the_end() -> None:
    model = train.build_model(replace(TINY, family="deepseek_v3", num_experts=16, top_k=2))
    load = torch.tensor([[3.0, 1.0, 2.0, 2.0] * 4])
    bias = train.routers(model)[0].e_score_correction_bias
    train.move_bias(model, load, 0.5)
    train.move_bias(model, load, 0.5)
    assert bias.tolist() == pytest.approx([-0.002, 0.002, 0, 0] * 4)
    train.move_bias(model, load, 0.97)
    assert bias.tolist() == pytest.approx([-0.002, 0.002, 0, 0] * 4)
    plain = train.build_model(TINY)
    train.move_bias(plain, load[:, :8], 0.5)  # a router without a bias stays as it is
    assert not hasattr(train.routers(plain)[0], "e_score_correction_bias")


def run(folder: Path, name: str, recipe: Recipe = TINY) -> None:
    places = train.Places(folder / "state", folder / "log", folder / "model", save_minutes=0)
    try:
        train.prepare(recipe, places)
        train.train_worker(0, 1, str(folder / name), recipe, places)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_top_1_router_learns_from_the_text() -> None:
    hard = replace(TINY, top_k=1)
    model = train.build_model(hard)
    document = data.document_of([([5, 6], [7, 8, 9])], 0, hard, [4], 10)
    batch = data.collate([[document]], hard, pad=1)
    token_loss, _, load, _ = train.losses(model, train.watch_routers(model), batch, hard)
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


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_variant_trains_a_few_steps_and_loads_again(name: str, tmp_path: Path) -> None:
    changed = {field for field, value in asdict(recipe_of(name)).items() if value != asdict(Recipe())[field]}
    assert changed == set(VARIANTS[name].changes), "one thing changed, and nothing else"
    small = replace(
        recipe_of(name), vocab_size=384, hidden_size=64, dense_width=64, expert_width=8, tokens=1500, step_tokens=640,
        max_length=320, chunk_tokens=1500, tokenizer_documents=20,
    )  # fmt: skip
    run(tmp_path, "once", small)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.config.model_type == small.family and len(train.routers(model)) == small.moe_layers
    trained = train.build_model(small)
    trained.load_state_dict(torch.load(tmp_path / "state/state.pt", weights_only=True)["model"])
    before = train.build_model(small).state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in trained.state_dict().items()), "it learned"
    for (key, value), ours in zip(model.state_dict().items(), trained.state_dict().values(), strict=True):
        if "correction_bias" in key:
            assert torch.equal(value, ours) and value.dtype == torch.float32 and value.abs().max() > 0
        else:
            assert torch.equal(value, ours.bfloat16()), key


def test_variants_are_trained_in_turn_and_finished_ones_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[Recipe, train.Places, int]] = []
    monkeypatch.setattr(train, "train", lambda *arguments: asked.append(arguments))
    done = tmp_path / ".panel/coarse/model"
    done.mkdir(parents=True)
    (done / "config.json").write_text("{}")
    assert panel_model("coarse") == ".panel/coarse/model"
    monkeypatch.setattr("sys.argv", ["train", "--variant", "seed2", "coarse", "seed1", "--workers", "1"])
    train.main()
    assert [recipe.seed for recipe, _, _ in asked] == [2000, 1000] and asked[0][2] == 1
    assert "coarse: its weights are at .panel/coarse/model" in capsys.readouterr().out
    with pytest.raises(WinnowError, match="train it with python -m harness.reference.train --variant seed1"):
        panel_model("seed1")
    with pytest.raises(WinnowError, match="unknown variant 'seed9'"):
        panel_model("seed9")
    monkeypatch.setattr("sys.argv", ["train", "--variant", "seed1", "--top-k", "4"])
    with pytest.raises(SystemExit):
        train.main()
    assert "give --workers and --save-minutes alone" in capsys.readouterr().err


def test_the_deepseek_style_model_is_that_of_its_recipe() -> None:
    folder = MODEL_FOLDER.with_name("model_deepseek")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    recipe, made = recipe_of("deepseek"), json.loads(Path("results/reference_model/deepseek/recipe.json").read_text())
    assert made == json.loads(json.dumps(asdict(recipe)))
    assert len(train.routers(model)) == recipe.moe_layers == 5
    assert model.config.scoring_func == "sigmoid" and (model.config.n_group, model.config.topk_group) == (8, 4)
    for router in train.routers(model):
        bias = router.e_score_correction_bias
        assert isinstance(bias, torch.Tensor) and bias.dtype == torch.float32 and bias.unique().numel() > 8
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer('def f(s):\n    """Return the length of the string."""', return_tensors="pt")
    written = model.float().generate(**asked, max_new_tokens=20, do_sample=False)[0, asked.input_ids.shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True) == "\n    return len(s)\n"
