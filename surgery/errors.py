"""Errors that a user can cause and act upon. Each message says where, what was found, what is needed, what to do."""


class SurgeryError(ValueError):
    """Base of every error that this library raises on purpose.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> try:
        ...     surgery.convert(SMALL, {"steps": [{"rewriter": "gqa", "kv_heads": 3}]})
        ... except surgery.SurgeryError as error:
        ...     print(type(error).__name__)
        PlanError
    """


class RecipeError(SurgeryError):
    """A recipe is malformed, or asks for a value that cannot be.

    Examples:
        >>> import surgery
        >>> surgery.Recipe.load({"steps": [{"rewriter": "gqa", "kv_heads": -1}]})
        Traceback (most recent call last):
        surgery.errors.RecipeError: recipe, step 1 (gqa): kv_heads: ...
    """


class UnsupportedModel(SurgeryError):
    """A model whose attention cannot be read, or cannot be read safely enough to rewrite.

    Examples:
        >>> import surgery
        >>> from transformers import T5Config
        >>> surgery.examine(T5Config())
        Traceback (most recent call last):
        surgery.errors.UnsupportedModel: t5: it is an encoder-decoder; only decoders can be read.
    """


class PlanError(SurgeryError):
    """A well-formed recipe that does not fit this model.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> surgery.plan(SMALL, {"steps": [{"rewriter": "gqa", "kv_heads": 3}]})
        Traceback (most recent call last):
        surgery.errors.PlanError: layer 0: cannot group 8 KV heads into 3 (8 % 3 != 0). Use one of 1, 2, 4, 8, ...
    """


class CheckpointError(SurgeryError):
    """A file of a checkpoint, tokenizer or text that is missing, damaged, or cannot be written.

    Examples:
        >>> import surgery
        >>> surgery.load("no-such-folder")
        Traceback (most recent call last):
        surgery.errors.CheckpointError: no-such-folder: no such folder.
    """
