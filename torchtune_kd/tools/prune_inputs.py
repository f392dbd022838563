"""What the command line of layer pruning reads. Errors are ValueErrors that name the option or the file."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torchtune.modules import TransformerDecoder
from torchtune.modules.transforms.tokenizers import ModelTokenizer
from torchtune.training import MODEL_KEY, FullModelHFCheckpointer, ModelType

from torchtune_kd._torchtune import component_from_path
from torchtune_kd.errors import first_line
from torchtune_kd.tools.kept_layers import read_config, safetensors_files

_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)


def check_checkpoint(folder: Path) -> int:
    """Return the number of layers of a Hugging Face folder, after a look at the files that hold its weights."""
    try:
        num_layers = read_config(folder)["num_hidden_layers"]
    except (*_NO_JSON, TypeError) as error:
        raise ValueError(_unreadable(folder / "config.json", "a JSON object", error)) from error
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(
            f"Expected 'num_hidden_layers' of at least 1 in {folder / 'config.json'}, but got {num_layers!r}; "
            "fetch the checkpoint again."
        )
    try:
        files = safetensors_files(folder)
    except (*_NO_JSON, TypeError, KeyError, AttributeError) as error:
        index = folder / "model.safetensors.index.json"
        raise ValueError(_unreadable(index, "a JSON object with 'weight_map'", error)) from error
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(_unreadable(file, "a safetensors file", error)) from error
    return num_layers


def check_model_type(name: str) -> None:
    """Raise a ValueError if torchtune's checkpointers know no such model type."""
    known = [kind.name for kind in ModelType]
    if name not in known:
        raise ValueError(f"Expected --model-type to be one of {', '.join(known)}, but got {name!r}; choose one.")


def read_text(file: Path) -> str:
    """Return the calibration text."""
    if not file.is_file():
        raise ValueError(f"Expected a calibration text under --text, but {file} is no file; check the path.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected a calibration text in UTF-8 under --text, but {file} is none ({error}); convert it."
        ) from error


def build_tokenizer(dotpath: str, file: str | Path) -> ModelTokenizer:
    """Return the tokenizer that a builder makes of a file."""
    builder = _component("--tokenizer", dotpath, "torchtune_kd.models.smollm2.smollm2_tokenizer")
    try:
        tokenizer = builder(str(file))
    except Exception as error:  # a tokenizer's file may fail in any way
        raise ValueError(
            f"Expected --tokenizer {dotpath} to read {file}, but it cannot ({first_line(error)}); give the tokenizer's "
            "own file under --tokenizer-path, or another --tokenizer."
        ) from error
    if not callable(getattr(tokenizer, "tokenize_messages", None)):  # what ModelTokenizer asks for
        raise ValueError(
            f"Expected --tokenizer {dotpath} to build a tokenizer, but it makes a {type(tokenizer).__name__}; "
            "name another builder."
        )
    return tokenizer


def build_model(dotpath: str) -> TransformerDecoder:
    """Return the model that a builder makes without arguments."""
    builder = _component("--model", dotpath, "torchtune_kd.models.smollm2.smollm2_135m")
    try:
        model = builder()
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Expected --model to name a builder that needs no arguments, e.g. torchtune.models.llama3_2.llama3_2_1b, "
            f"but {dotpath} cannot be called so ({first_line(error)}); name the builder of this checkpoint's size."
        ) from error
    if not isinstance(model, TransformerDecoder):
        raise ValueError(
            f"Expected --model {dotpath} to build a TransformerDecoder, but it makes a {type(model).__name__}; "
            "name another builder."
        )
    return model


def load_weights(model: TransformerDecoder, dotpath: str, folder: Path, model_type: str) -> None:
    """Load the weights of a Hugging Face folder into the model that ``dotpath`` built."""
    with tempfile.TemporaryDirectory() as unused:  # the checkpointer creates its output folder
        try:
            checkpointer = FullModelHFCheckpointer(
                checkpoint_dir=str(folder),
                checkpoint_files=[file.name for file in safetensors_files(folder)],
                model_type=model_type,
                output_dir=unused,
            )
            weights = checkpointer.load_checkpoint()[MODEL_KEY]
        except Exception as error:  # what it meets in a checkpoint of another kind may be anything
            raise ValueError(
                f"Expected a checkpoint of --model-type {model_type} in {folder}, but torchtune cannot convert it "
                f"({first_line(error)}); give the checkpoint's own --model-type."
            ) from error
    built = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    stored = {name: list(weight.shape) for name, weight in weights.items()}
    differing = [name for name in {**built, **stored} if built.get(name) != stored.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"Expected --model {dotpath} to build the model of {folder}, but {len(differing)} weights differ, first "
            f"{name} ({built.get(name, 'none')} in the model, {stored.get(name, 'none')} in the checkpoint); "
            "name this checkpoint's builder."
        )
    model.load_state_dict(weights)


def _component(option: str, dotpath: str, example: str) -> Callable[..., Any]:
    try:
        return component_from_path(dotpath)
    except Exception as error:  # torchtune raises several kinds here, in several lines
        raise ValueError(
            f"Expected {option} to name a component such as {example}, but {dotpath!r} cannot be imported "
            f"({first_line(error.__cause__ or error)}); check the name."
        ) from error


def _unreadable(file: Path, expected: str, error: Exception) -> str:
    return f"Expected {expected} in {file}, but it cannot be read ({first_line(error)}); fetch the checkpoint again."
