"""All kinds of mutated inputs. To add one: a module here with a tuple of `Kind`, and its name in `KINDS`."""

from tests.mutations.artifacts import KINDS_OF_ARTIFACTS
from tests.mutations.base import Kind
from tests.mutations.folders import KINDS_OF_FOLDERS
from tests.mutations.openvino import KINDS_OF_OPENVINO
from tests.mutations.recipes import KINDS_OF_RECIPES
from tests.mutations.studies import KINDS_OF_STUDIES

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (*KINDS_OF_RECIPES, *KINDS_OF_STUDIES, *KINDS_OF_FOLDERS, *KINDS_OF_ARTIFACTS, *KINDS_OF_OPENVINO)
}

__all__ = ["KINDS", "Kind"]
