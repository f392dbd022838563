"""Measure models, quality, speed and size: ``tune run torchtune_kd/evaluate --config ... tasks=[heldout,cities]``."""

import sys

import torchtune_kd.training as kd  # first: it says in one sentence when torchtune cannot be imported

# isort: split
from omegaconf import DictConfig

from torchtune_kd import evaluation


@kd.command
def recipe_main(cfg: DictConfig) -> None:
    """Measure models on tasks, print a table, and add one line of JSON for every metric to ``results``.

    With the config of a training run the models are those of the run: ``untrained``, ``student`` (its newest
    ``epoch_<n>``) and ``teacher``. These keys are the evaluation's own, all optional: ``models`` (a list of these
    names, or a section with ``model`` and ``checkpointer`` for each), ``reference``, ``tasks`` (heldout, cities,
    mmlu_dev, a .jsonl file of your own, lm_eval:NAME), ``latency`` (prompt_tokens, new_tokens, batch_sizes, repeats;
    null times nothing), ``limit``, ``items``, ``results``.
    """
    request = evaluation.read_request(cfg)
    results = evaluation.evaluate(request)
    print(evaluation.as_table(results, [source.name for source in request.sources]))
    print(f"\n{len(results)} lines were added to {request.results}")


if __name__ == "__main__":
    sys.exit(recipe_main())
