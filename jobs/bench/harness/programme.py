"""The contests of a benchmark: cases, networks, numbers of images and of rounds."""

from collections.abc import Sequence
from dataclasses import dataclass

NULL = "null"
"""The name of the null network (jobs/bench/harness/null.py), with which a run costs what everything else costs."""


@dataclass(frozen=True)
class Entry:
    """One contest. small, large: images of its two archives."""

    case: str
    model: str
    small: int
    large: int


@dataclass(frozen=True)
class Sizes:
    """Images of the small and the large archive, with a real network and with the null network."""

    network: tuple[int, int]
    null: tuple[int, int]


@dataclass(frozen=True)
class Form:
    """models: the default networks, by case."""

    sizes: dict[str, Sizes]
    models: dict[str, tuple[str, ...]]
    rounds: int

    def entries(self, cases: Sequence[str], models: Sequence[str], small: int | None, large: int | None) -> list[Entry]:
        """cases, models, small, large: as given by flags. Empty or None: the defaults of this form."""
        return [
            self._entry(case, model, small, large)
            for case in cases or self.models
            for model in models or self.models.get(case, (NULL,))
        ]

    def _entry(self, case: str, model: str, small: int | None, large: int | None) -> Entry:
        usual = self.sizes[case].null if model == NULL else self.sizes[case].network
        return Entry(case, model, usual[0] if small is None else small, usual[1] if large is None else large)


PHOTOS, LARGE = Sizes((200, 1_000), (500, 3_000)), Sizes((40, 120), (40, 120))
TILES = Sizes((200, 1_000), (4_000, 20_000))
LONG_PHOTOS, LONG_LARGE = Sizes((500, 3_000), (1_000, 6_000)), Sizes((60, 200), (60, 200))
LONG_TILES = Sizes((500, 3_000), (20_000, 100_000))
TINY, TINY_TILES, TINY_LARGE = Sizes((32, 96), (32, 96)), Sizes((64, 192), (64, 192)), Sizes((4, 12), (4, 12))


def _sizes(photos: Sizes, tiles: Sizes, large: Sizes) -> dict[str, Sizes]:
    return {
        "photos": photos,
        "photo-tars": photos,
        "photos-s3": photos,
        "tiles": tiles,
        "one-tar": tiles,
        "large": large,
    }


FORMS = {
    "standard": Form(
        _sizes(PHOTOS, TILES, LARGE),
        {
            "photos": ("resnet18", NULL),
            "photo-tars": (NULL,),
            "photos-s3": (NULL,),
            "tiles": (NULL,),
            "large": (NULL,),
        },
        rounds=1,
    ),
    "long": Form(
        _sizes(LONG_PHOTOS, LONG_TILES, LONG_LARGE),
        {
            "photos": ("resnet18", "resnet50", NULL),
            "photo-tars": (NULL,),
            "photos-s3": (NULL,),
            "tiles": ("resnet18", NULL),
            "one-tar": (NULL,),
            "large": ("resnet18", NULL),
        },
        rounds=3,
    ),
    "quick": Form(
        _sizes(TINY, TINY_TILES, TINY_LARGE),
        {"photos": ("resnet18", NULL), "photos-s3": (NULL,), "tiles": ("resnet18",), "large": (NULL,)},
        rounds=1,
    ),
}
"""On two cores standard takes half an hour, long some hours, quick minutes; quick only shows that everything runs."""
