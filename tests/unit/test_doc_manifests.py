"""Every manifest that the pages of the methods and the README show can be planned as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from manifest_cases import ROOT, edited
from stagetune_api.facts import DataFacts, Facts, GradientFacts, ModelFacts
from stagetune_api.names import KIND
from stagetune_api.spec import StagedFineTune
from stagetune_api.structural import Node
from stagetune_api.validation import parse_manifest
from stagetune_operator.model_facts import model_facts_from_config
from stagetune_operator.plan import Plan, make_plan

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "methods").glob("*.md"))]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 28,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "tie_word_embeddings": False,
}
DATA = DataFacts(
    train_rows=1000,
    validation_rows=50,
    train_tokens=200_000,
    train_answer_tokens=60_000,
    max_row_tokens=512,
)


def blocks(page: Path) -> list[str]:
    """Return the YAML blocks of a page."""
    return re.findall(r"^```yaml\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


BLOCKS = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, text in enumerate(blocks(page))
]


def completed(text: str) -> Node:
    """Return the manifest that a block shows; one that shows parts of it stands on a sound one."""
    shown: dict[str, Any] = YAML(typ="safe").load(text)
    if shown.get("kind") == KIND:
        return shown
    document = edited()
    sections = shown.get("spec", shown)
    assert isinstance(sections, dict)
    if "stages" in sections:
        del document["spec"]["schedule"]
    for name, section in sections.items():
        usual = document["spec"].get(name, {}) if name in ("training", "dataset") else {}
        document["spec"][name] = {**usual, **section} if isinstance(section, dict) else section
    return document


@pytest.mark.parametrize("text", BLOCKS)
def test_manifest_on_a_page_can_be_planned(text: str, server: Any) -> None:
    document = completed(text)
    assert server.refusals(document) == []
    manifest = parse_manifest(document)
    assert isinstance(manifest, StagedFineTune), manifest
    model = model_facts_from_config(CONFIG)
    assert isinstance(model, ModelFacts)
    profile = GradientFacts(relative_norms=[1.0] * 28, rows=16, tokens=99)
    facts = Facts(model=model, data=DATA, model_directory="models/base", gradients=profile)
    assert isinstance(plan := make_plan(manifest.spec, facts), Plan), plan


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_of_a_method_shows_a_manifest(page: Path) -> None:
    assert blocks(page)
    # What is indented instead would be looked at by nobody.
    assert not re.search(
        r"^    (spec|method|schedule|stages|training|protection):$",
        page.read_text("utf-8"),
        re.MULTILINE,
    )
