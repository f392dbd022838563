"""Show where a student differs from its teacher: ``tune run torchtune_kd/inspect --config ... text=heldout.txt``."""

import sys

import torchtune_kd.training as kd  # first: it says in one sentence when torchtune cannot be imported

# isort: split
from omegaconf import DictConfig

from torchtune_kd.evaluation import inspection


@kd.command
def recipe_main(cfg: DictConfig) -> None:
    """Write a page that shows, at every token of a text, how far two models differ and what both expect.

    The config is that of a training run. These keys are the inspection's own: ``text`` (a file in UTF-8), ``student``
    (the model to inspect; by default ``student``, the newest ``epoch_<n>`` in ``output_dir``, or ``untrained`` where
    there is none), ``reference`` (by default ``teacher``), ``output`` (by default ``inspect.html`` in ``output_dir``).
    """
    request = inspection.read_request(cfg)
    with kd.report_errors():
        found = inspection.inspect(request)
    student, reference = found.student, found.reference
    print(
        f"{student.name} ({student.folder}) against {reference.name} ({reference.folder}) on {request.text}: "
        f"{len(found.tokens):,} tokens, mean KL {found.kl:.3g} nats, agreement {found.agreement:.1%}, perplexity "
        f"{found.student_perplexity:.3g} against {found.reference_perplexity:.3g}"
    )
    print(f"Open {request.output} in a browser: it needs no network.")


if __name__ == "__main__":
    sys.exit(recipe_main())
