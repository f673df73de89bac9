"""Model types that transformers does not know, though it has their architecture under another name."""

from functools import cache


@cache
def teach_transformers(alias: str, model_type: str) -> None:
    """From now on transformers takes ``alias`` for a model type: another name of ``model_type``, which it knows.

    What it saves keeps the alias. Nothing happens where it knows the alias already.
    """
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    if alias in CONFIG_MAPPING:
        return
    known = CONFIG_MAPPING[model_type]
    # The classes of models are found by the name of the config's class, which therefore stays.
    CONFIG_MAPPING.register(alias, type(known.__name__, (known,), {"model_type": alias, "__module__": __name__}))
    conversion = get_checkpoint_conversion_mapping(model_type)
    register_checkpoint_conversion_mapping(alias, conversion, overwrite=True)
