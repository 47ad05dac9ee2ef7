"""Errors that a user can cause and act upon. Each message says where, what was found, what is needed, what to do."""


class SurgeryError(ValueError):
    """Base of every error that this library raises on purpose."""


class RecipeError(SurgeryError):
    """A recipe is malformed, or asks for a value that cannot be."""


class UnsupportedModel(SurgeryError):
    """A model whose attention cannot be read, or cannot be read safely enough to rewrite."""


class PlanError(SurgeryError):
    """A well-formed recipe that does not fit this model."""


class CheckpointError(SurgeryError):
    """A file of a checkpoint, tokenizer or text that is missing, damaged, or cannot be written."""
