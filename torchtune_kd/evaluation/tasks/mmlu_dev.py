"""MMLU's development questions (Hendrycks et al. 2021), which lm-eval's wheel holds."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

from torchtune_kd.errors import UserError
from torchtune_kd.evaluation.tasks.items import Item

_FILE = Path("tasks/mmlu/flan_cot_fewshot/_cot_prompts.json")
_QUESTION = re.compile(r"Q:\s*(.+?)\s*\n?\s*(\(A\).+?)\nA:(.*?)(?=\n\s*\nQ:|\Z)", re.DOTALL)
_CHOICE = re.compile(r"\(([A-D])\)\s*(.*?)(?=\s*\([A-D]\)|\Z)", re.DOTALL)
_ANSWER = re.compile(r"answer is \(?([A-D])\)?")


def mmlu_dev() -> list[Item]:
    """Return the five development questions of each of the 57 subjects, as far as they can be told from their prompts.

    A question is followed by "Answer:" and the text of a choice, without letters: small models do not know the letters.

    Raises:
        UserError: if lm-eval is not installed.
    """
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "The task `mmlu_dev` reads questions that come with lm-eval, which is not installed: run "
            "`pip install 'torchtune-kd[evaluate]'`."
        )
    prompts = json.loads((Path(spec.submodule_search_locations[0]) / _FILE).read_text(encoding="utf-8"))
    items = []
    for _, text in sorted(prompts.items()):
        for question, choices, reasoning in _QUESTION.findall(text):
            texts = {letter: " ".join(choice.split()) for letter, choice in _CHOICE.findall(choices)}
            answer = _ANSWER.search(reasoning)
            if list(texts) == ["A", "B", "C", "D"] and all(texts.values()) and answer:
                context = f"Question: {' '.join(question.split())}\nAnswer:"
                items.append(Item(context, tuple(f" {t}" for t in texts.values()), "ABCD".index(answer[1])))
    return items
