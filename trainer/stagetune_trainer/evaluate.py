"""The Evaluate task: the base model and the finished one, on the same questions and texts."""

import copy
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stagetune_api.report import (
    AveragingResult,
    EvaluationResult,
    ModelScores,
    Outcome,
    SampleAnswer,
    StageReport,
)
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.assemble import assemble, assemble_for_averaging, load_base_for_export
from stagetune_trainer.averaging import alpha_of, choose_alpha
from stagetune_trainer.data.batch import Batch
from stagetune_trainer.data.batches import (
    ValidationQuestion,
    open_general_rows,
    open_validation_questions,
    open_validation_rows,
)
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.loss import AnswerLoss, OutputHead
from stagetune_trainer.memory import peak_memory_bytes
from stagetune_trainer.metrics import ProgressLog

_ANSWERS_AT_ONCE = 16
_KL_ROWS_AT_ONCE = 512
_SAMPLE_TEXT_MAX_LENGTH = 8192


@dataclass(frozen=True, kw_only=True)
class _AnswerStates:
    """What a model's head sees where validation answers are, enough for its whole distribution."""

    features: Tensor
    """Features [N, ...] on the CPU."""
    head: OutputHead
    """A head of its own, since the model is gone by the time it is used."""

    def log_probabilities(self, rows: slice, device: torch.device) -> Tensor:
        """Return log-probabilities [n, vocabulary] in fp32."""
        logits = self.head.logits(self.features[rows].to(device))
        return functional.log_softmax(logits.float(), dim=-1)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    scores: ModelScores
    answers: list[str]
    states: _AnswerStates


def evaluate(config: StageConfig, log: ProgressLog) -> StageReport:
    """Score the base model and the finished one; one of them is in memory at a time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exact_match = config.evaluation.exact_match
    num_questions = max(exact_match.max_rows if exact_match else 0, config.evaluation.samples)
    questions = open_validation_questions(config)[:num_questions]

    log.message("measuring the base model")
    base = load_base_for_export(config, device)
    base.model.train(False)
    # After the base was verified: a damaged tokenizer is named like any damaged file.
    tokenizer = AutoTokenizer.from_pretrained(config.model_directory, trust_remote_code=False)
    before = _measure(base, config, tokenizer, questions, log)
    del base
    finished, averaging = finished_model(config, device, log)
    log.message("measuring the finished model")
    after = _measure(finished, config, tokenizer, questions, log)
    divergence = kl_divergence(before.states, after.states, device)
    samples = [
        SampleAnswer(
            question=question.question[:_SAMPLE_TEXT_MAX_LENGTH],
            reference=question.reference[:_SAMPLE_TEXT_MAX_LENGTH],
            before=first[:_SAMPLE_TEXT_MAX_LENGTH],
            after=second[:_SAMPLE_TEXT_MAX_LENGTH],
        )
        for question, first, second in zip(questions, before.answers, after.answers, strict=True)
    ]
    result = EvaluationResult(
        before=before.scores,
        after=after.scores.model_copy(update={"kl_to_base": divergence}),
        exact_match_rows=len(_scored(questions, config)),
        samples=samples[: config.evaluation.samples],
        averaging=averaging,
    )
    return StageReport(
        task=Task.EVALUATE,
        name="evaluate",
        attempt=config.attempt,
        outcome=Outcome.SUCCEEDED,
        peak_memory_bytes=peak_memory_bytes(device),
        device=device.type,
        evaluation=result,
    )


@torch.no_grad()
def finished_model(
    config: StageConfig, device: torch.device, log: ProgressLog
) -> tuple[Decoder, AveragingResult | None]:
    """Return the model that will be exported, and how its average was chosen where it was."""
    averaging = config.protection.averaging
    if averaging is None or alpha_of(config) is not None:
        return assemble(config, device), None
    log.message("choosing the share of the tuned weights on the validation rows")
    decoder, weights = assemble_for_averaging(config, device)
    loss = AnswerLoss(decoder)

    def validation_loss(alpha: float) -> float:
        weights.set_share(alpha)
        found = mean_loss(loss, open_validation_rows(config).batches())
        log.message(f"alpha {alpha:.1f}: validation loss {found:.4f}")
        return found

    result = choose_alpha(validation_loss, averaging.tolerance)
    weights.set_share(result.chosen)
    return decoder, result


@torch.no_grad()
def _measure(
    decoder: Decoder,
    config: StageConfig,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ValidationQuestion],
    log: ProgressLog,
) -> _Measured:
    """Return everything one model is asked for."""
    loss = AnswerLoss(decoder)
    validation_loss, states = _validation(loss, open_validation_rows(config).batches())
    log.message(f"validation loss {validation_loss:.4f}")
    general_loss = None
    if config.evaluation.general_text is not None:
        general_loss = mean_loss(loss, open_general_rows(config).batches())
        log.message(f"loss on general text {general_loss:.4f}")
    exact_match = config.evaluation.exact_match
    max_new_tokens = exact_match.max_new_tokens if exact_match else 64
    answers = answer(decoder, tokenizer, questions, max_new_tokens)
    score = None
    if exact_match is not None:
        scored = _scored(questions, config)
        matches = [
            is_exact_match(answer, question.reference)
            for answer, question in zip(answers, scored, strict=False)
        ]
        score = sum(matches) / len(matches)
        log.message(f"exact match {score:.3f} of {len(matches)}")
    scores = ModelScores(
        validation_loss=validation_loss, general_loss=general_loss, exact_match=score
    )
    return _Measured(scores=scores, answers=answers, states=states)


def _scored(
    questions: Sequence[ValidationQuestion], config: StageConfig
) -> Sequence[ValidationQuestion]:
    """Return the questions that count for exact match; samples may need more than those."""
    exact_match = config.evaluation.exact_match
    return questions[: exact_match.max_rows] if exact_match else []


def _validation(loss: AnswerLoss, batches: Iterator[Batch]) -> tuple[float, _AnswerStates]:
    """Return the mean answer loss and the features that it was computed from."""
    total, parts = 0.0, []
    for batch in batches:
        features, targets = loss.features_of(batch)
        total += float(loss.head.cross_entropy_sum(features, targets))
        parts.append(features.cpu())
    features = torch.cat(parts)
    states = _AnswerStates(features=features, head=copy.deepcopy(loss.head))
    return total / len(features), states


def mean_loss(loss: AnswerLoss, batches: Iterator[Batch]) -> float:
    """Return the mean loss over all labelled tokens of `batches`, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        batch_loss, batch_count = loss.of(batch)
        total += float(batch_loss)
        count += batch_count
    return total / count


@torch.no_grad()
def kl_divergence(base: _AnswerStates, tuned: _AnswerStates, device: torch.device) -> float:
    """Return the mean KL(base || tuned) in nats a token, over the whole vocabulary.

    How far the distribution on the task's own tokens moved tells how much is forgotten elsewhere
    (arXiv 2509.04259).
    """
    total = 0.0
    num_rows = len(base.features)
    for start in range(0, num_rows, _KL_ROWS_AT_ONCE):
        rows = slice(start, start + _KL_ROWS_AT_ONCE)
        expected = base.log_probabilities(rows, device)
        found = tuned.log_probabilities(rows, device)
        total += float(functional.kl_div(found, expected, reduction="sum", log_target=True))
    return total / num_rows


@torch.no_grad()
def answer(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ValidationQuestion],
    max_new_tokens: int,
) -> list[str]:
    """Return the model's greedy answers to `questions`, special tokens left out."""
    model: Any = decoder.model
    device = decoder.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers: list[str] = []
    for start in range(0, len(questions), _ANSWERS_AT_ONCE):
        prompts = [question.prompt_ids for question in questions[start : start + _ANSWERS_AT_ONCE]]
        width = max(len(prompt) for prompt in prompts)
        # Padded on the left, so that every answer begins at the same position.
        input_ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        generated = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # What the model's own generation_config may hold is not greedy decoding.
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=pad,
            eos_token_id=_end_tokens(decoder, tokenizer),
        )
        answers += tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return [text.strip() for text in answers]


def _end_tokens(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends an answer: the model's own and the tokenizer's."""
    model: Any = decoder.model
    configured = model.generation_config.eos_token_id
    tokens = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*tokens, tokenizer.eos_token_id] if token is not None})


def is_exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are the same but for case, white space, width and a final full stop."""
    return _normalised(answer) == _normalised(reference)


def _normalised(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(".。 ")
