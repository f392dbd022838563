"""In which country is this city? From the time-zone database, which every Linux and the package tzdata hold."""

import hashlib
from pathlib import Path

from torchtune_kd.errors import UserError
from torchtune_kd.evaluation.tasks.items import Item

_CHOICES = 4
_SYSTEM = Path("/usr/share/zoneinfo")


def cities() -> list[Item]:
    """Return one question for every city of the time-zone database.

    "The city of Dubai is in the country of", and four countries: the right one and three that follow from a hash of the
    city's name. Chance is 25 %. The questions follow from the database alone: another version of it
    is another task, as their fingerprint tells.

    Raises:
        UserError: if the database is not there.
    """
    names = {}
    for line in _lines("iso3166.tab"):
        code, name = line.split("\t")[:2]
        names[code] = name.removesuffix(" (GB)").partition(" (")[0]
    items = []
    for line in sorted(_lines("zone.tab"), key=lambda line: line.split("\t")[2]):
        code, _, zone = line.split("\t")[:3]
        country, city = names.get(code), zone.rpartition("/")[2].replace("_", " ")
        if country is None or city.casefold() in country.casefold():  # the answer would stand in the question
            continue
        others = sorted((name for name in set(names.values()) if name != country), key=lambda name: _hash(city + name))
        choices = sorted([country, *others[: _CHOICES - 1]], key=lambda name: _hash(name + city))
        context = f"The city of {city} is in the country of"
        items.append(Item(context, tuple(f" {choice}" for choice in choices), choices.index(country)))
    return items


def _lines(name: str) -> list[str]:
    """Read a table of the database, without its comments."""
    try:
        import tzdata

        folder = Path(tzdata.__file__).parent / "zoneinfo"
    except ImportError:
        folder = _SYSTEM
    try:
        text = (folder / name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"The task `cities` reads {folder / name}, which is not there: run `pip install tzdata`."
        ) from error
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
