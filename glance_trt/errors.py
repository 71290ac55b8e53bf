"""The errors that glance-trt raises. Each kind has its own exit code on the command line."""

from __future__ import annotations


class GlanceError(Exception):
    """Base of every error that a user can mend; its text says what, where, what was expected, and what to do."""

    exit_code = 1


class RecipeError(GlanceError):
    """A recipe or a target file is wrong: an unknown key, a missing file, steps that make no schedule."""

    exit_code = 3


class ModelError(GlanceError):
    """A base model cannot be read, or is of no supported family."""

    exit_code = 4


class LoraError(GlanceError):
    """A LoRA file cannot be read, or does not fit the model."""

    exit_code = 5


class BundleError(GlanceError):
    """A bundle is damaged, altered, malformed, or of a newer format."""

    exit_code = 6


class TargetError(GlanceError):
    """This machine cannot build or run what was asked."""

    exit_code = 7


class InputError(GlanceError):
    """A value given for one image or run is not usable: a prompt, a size, a guidance scale, a schedule's name."""

    exit_code = 8


class OutputError(GlanceError):
    """A result cannot be written: the file exists, or the disk is full."""

    exit_code = 9


class ParityError(GlanceError):
    """An exported graph or an engine does not compute what PyTorch computes."""

    exit_code = 10


class TrainingError(GlanceError):
    """Training cannot start or go on: a checkpoint of another recipe, a loss that is not a number."""

    exit_code = 11
