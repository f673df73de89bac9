"""What published sets are about, by name: the domain of a score where neither its task nor the suite says another."""

OTHERWISE = "knowledge"
DOMAINS = {
    "language": (
        "hellaswag", "winogrande", "lambada", "boolq", "rte", "wikitext", "c4", "copa", "cb", "wic", "wsc", "multirc",
        "record", "anli", "xnli", "glue", "storycloze", "blimp", "pile", "paloma", "race", "squadv2", "drop",
    ),
    "math": ("gsm8k", "math", "minerva_math", "hendrycks_math", "mgsm", "asdiv", "aime", "arithmetic", "mathqa"),
    "code": ("humaneval", "mbpp", "livecodebench", "code2text", "jsonschema_bench"),
    "writing": ("wildbench", "writingbench"),
}  # fmt: skip


def domain_of(name: str) -> str:
    """The domain of the set that ``name`` is, or is a part or a variant of (``lambada_openai``, ``gsm8k_cot``)."""
    found = [
        (len(known), domain)
        for domain, names in DOMAINS.items()
        for known in names
        if name == known or name.startswith(f"{known}_")
    ]
    return max(found)[1] if found else OTHERWISE
