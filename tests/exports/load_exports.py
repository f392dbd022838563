"""Load exports as a user of transformers and peft does, and write their logits: ``load_exports.py CASES LOGITS``.

CASES is a JSON object, by name: the loader (a key of LOADERS), its folders, and the token ids. LOGITS becomes a
safetensors file with fp32 logits [S, V] by the same names. What cannot be loaded, or not in fp32, is printed and makes
the exit status 1.
"""

import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def merged(folder: str) -> PreTrainedModel:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loading[kind], (kind, loading[kind])
    assert not hasattr(model, "peft_config"), "the folder was loaded with an adapter"
    AutoTokenizer.from_pretrained(folder)
    return model


def adapter_alone(folder: str) -> PeftModel:
    """The adapter's own config names the base model."""
    return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapter_on(base: str, folder: str) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


def adapter_merged_by_peft(base: str, folder: str) -> PreTrainedModel:
    return adapter_on(base, folder).merge_and_unload()


LOADERS = {loader.__name__: loader for loader in (merged, adapter_alone, adapter_on, adapter_merged_by_peft)}


@torch.no_grad()
def main(cases: str, logits: str) -> int:
    torch.set_num_threads(1)
    found, failed = {}, 0
    for name, (loader, folders, tokens) in json.loads(Path(cases).read_text()).items():
        try:
            model = LOADERS[loader](*folders).eval()
        except Exception as error:  # whatever it is, the other exports are looked at too
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = 1
            continue
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if dtypes != {torch.float32}:
            print(f"{name}: expected fp32 weights, got {dtypes}", file=sys.stderr)
            failed = 1
        found[name] = model(torch.tensor([tokens])).logits[0].float().contiguous()
    save_file(found, logits)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
