"""The numbers of the reference MoE's recipe; read without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the model becomes. ``shots``: at most so many solved examples in a prompt."""

    family: str = "qwen3_moe"
    vocab_size: int = 2048
    hidden_size: int = 128
    num_layers: int = 6
    dense_layers: tuple[int, ...] = (0, 1, 3, 5)
    dense_width: int = 512
    num_experts: int = 128
    top_k: int = 8
    expert_width: int = 32
    balance: float = 1e-4
    tokens: int = 7_000_000
    step_tokens: int = 4096
    max_length: int = 320
    learning_rate: float = 2e-3
    warmup: float = 0.02
    decay: float = 0.3
    weight_decay: float = 0.1
    prompt_weight: float = 0.25
    shares: tuple[tuple[str, float], ...] = (
        ("code", 0.22), ("math", 0.36), ("writing", 0.14), ("knowledge", 0.14), ("real_text", 0.14),
    )  # fmt: skip
    chunk_tokens: int = 500_000
    tokenizer_documents: int = 4_000
    shots: int = 0
    seed: int = 0

    @property
    def moe_layers(self) -> int:
        return self.num_layers - len(self.dense_layers)
