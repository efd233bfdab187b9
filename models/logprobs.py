"""Log-prob, length and mean entropy of every response in rows, exactly as `model(...).logits` gives them.

The decoder runs once over the rows; the lm head (`models.head`) only over the positions that predict a
response token.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch._dynamo.config as dynamo
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from models.architecture import (
    ModelSizes,
    explain_row_dependence,
    find_decoder,
    find_rope_switch,
    find_row_limit,
)
from models.config import ModelError
from models.head import Head, ModelForwardHead, compute_max_entropy, select_head
from models.rows import PromptWithResponses, Rows, build_rows

log = logging.getLogger(__name__)

# Accepted error of a probe in nats per token. Norms and softmax round to float32 even in a float64 model; a
# leak between the probe's equal responses gives an error far above the noise of bfloat16 and float16.
_TOLERANCE, _TOLERANCE_16_BIT = 1e-3, 0.15
_FLEX_WIDTH, _FLEX_GRAPHS = 128, 64
_sharing_reasons: "WeakKeyDictionary[PreTrainedModel, str | None]" = WeakKeyDictionary()


class SequenceScores(NamedTuple):
    """Scores of S responses, one entry each.

    logps:   (S,) summed over response tokens, nats.
    lengths: (S,) int64, response tokens.
    entropy: (S,) mean over response tokens / log V, in [0, 1], without gradient; None if not requested.
    """

    logps: Tensor
    lengths: Tensor
    entropy: Tensor | None


class Scorer(nn.Module):
    """A module that computes log-probs of responses under one causal language model.

    `model` keeps its dtype, adapter and mode (train or eval); sums are float32, or float64 for a float64
    model. The head processes `chunk_tokens` response tokens at a time: memory is chunk_tokens x V floats.
    Raises ModelError where the model's logits do not follow from its decoder's hidden states.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, chunk_tokens: int = 1024) -> None:
        super().__init__()
        if chunk_tokens < 1:
            raise ModelError(f"chunk_tokens must be at least 1, got {chunk_tokens}; try 1024")
        self.model = model
        self.chunk_tokens = chunk_tokens
        causal = get_causal_model(model)
        self._head = _select_checked_head(causal)
        self.prefix_sharing_unavailable_reason = prefix_sharing_unavailable_reason(model)
        self._sizes = ModelSizes.from_model(causal)
        self._row_limit = find_row_limit(causal.config)
        self._pass_settings = _PassSettings.from_model(causal)

    def forward(self, rows: Rows, *, entropy: bool = False) -> SequenceScores:
        """Score every sequence of `rows`, which must be on the model's device.

        Raises ModelError for rows that this model cannot score independently of each other.
        """
        reason = self.prefix_sharing_unavailable_reason
        if rows.shared and reason is not None:
            raise ModelError(f"prefix sharing is not exact for this model: {reason}; build plain rows")
        if self._row_limit is not None and rows.input_ids.shape[1] + 1 > self._row_limit.tokens:
            raise ModelError(
                f"a row of {rows.input_ids.shape[1] + 1} tokens is too long for this model: beyond "
                f"{self._row_limit.tokens}, {self._row_limit.reason}; lower data.max_length"
            )
        return _score_rows(
            get_causal_model(self.model),
            self._head,
            rows,
            chunk_tokens=self.chunk_tokens,
            entropy=entropy,
            settings=self._pass_settings,
        )

    @property
    def head_weights(self) -> list[nn.Parameter]:
        """Weights that are used after the decoder, in an order that is the same on every rank."""
        causal = get_causal_model(self.model)
        inside = {id(weight) for weight in find_decoder(causal).parameters()}
        outside = [weight for weight in causal.parameters() if id(weight) not in inside]
        head = causal.get_output_embeddings()
        tied = [] if head is None else [weight for weight in head.parameters() if id(weight) in inside]
        return outside + tied

    def equalize_passes(self) -> None:
        """Run equally many decoder passes for any rows, where every pass is a collective of all ranks."""
        self._pass_settings = self._pass_settings._replace(equal_passes=True)

    def synchronize_chunk_counts(self, max_over_ranks: Callable[[int], int]) -> None:
        """Make all ranks run the same number of head chunks, where any module's forward is a collective.

        `max_over_ranks` returns the largest of the ranks' counts.
        """
        if isinstance(self._head, ModelForwardHead):
            self._head = replace(self._head, max_over_ranks=max_over_ranks)

    @torch.no_grad()
    def compute_logits(self, ids: Tensor) -> Tensor:
        """(R, T) token ids -> (R, T, V) the model's own logits."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def generate(self, ids: Tensor, **settings: Any) -> Tensor:
        """(R, T) prompts -> (R, T + new) prompts and generated tokens; `settings` are those of `generate`."""
        generated: Tensor = get_causal_model(self.model).generate(ids, **settings)
        return generated

    def estimate_forward_flops(self, rows: Rows) -> float:
        """Estimate the floating-point operations of one forward pass over `rows`, for utilisation figures.

        2 per weight of a matrix that a token uses (the head: response tokens only; experts: the share that a
        token is routed to), plus 4 per head width and attended (query, key) pair. Norms, embeddings and
        padding do not count. A backward pass costs twice that when every weight is trained, about once with a
        frozen base.
        """
        sizes = self._sizes
        matrices = 2.0 * (sizes.body * rows.tokens + sizes.head * rows.response_tokens)
        return matrices + 4.0 * sizes.attention * rows.attended_pairs


def get_causal_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model itself, with adapters in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def prefix_sharing_unavailable_reason(model: PreTrainedModel | PeftModel) -> str | None:
    """Return why computing a prompt once for several responses is not exact for `model`; None if it is.

    Known causes are read from the config; others are detected by scoring a few random tokens.
    """
    causal = get_causal_model(model)
    if causal not in _sharing_reasons:
        with _switch_to_eval(causal):
            reason = explain_row_dependence(causal) or _reason_from_probe(causal)
        if reason is not None:
            log.info("%s: prompts are not shared between responses: %s", causal.name_or_path, reason)
        _sharing_reasons[causal] = reason
    return _sharing_reasons[causal]


class _PassSettings(NamedTuple):
    """How rows go through a decoder.

    rope_switch:  length beyond which rows use other rotary frequencies; None if there is none.
    equal_passes: whether every rank runs a pass for short and one for long rows, whatever its rows.
    rounding:     rows are padded to a multiple of this width.
    """

    rope_switch: int | None = None
    equal_passes: bool = False
    rounding: int = 1

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> "_PassSettings":
        # FlexAttention compiles a kernel for every width, and falls back to a slow one after a few.
        flex = model.config._attn_implementation == "flex_attention"
        if flex:
            dynamo.recompile_limit = max(dynamo.recompile_limit, _FLEX_GRAPHS)
        return cls(find_rope_switch(model.config), rounding=_FLEX_WIDTH if flex else 1)


def _score_rows(
    model: PreTrainedModel,
    head: Head,
    rows: Rows,
    *,
    chunk_tokens: int,
    entropy: bool,
    settings: _PassSettings,
) -> SequenceScores:
    rows = rows.round_width(settings.rounding)
    states = _compute_hidden_states(model, rows, settings).flatten(0, 1).index_select(0, rows.predictors)
    logps, entropies, vocab_size = head(states, rows.targets, chunk_tokens=chunk_tokens, entropy=entropy)
    sums = logps.new_zeros(len(rows.lengths)).index_add(0, rows.sequences, logps)
    if entropies is None:
        return SequenceScores(sums, rows.lengths, None)
    entropy_sums = entropies.new_zeros(len(rows.lengths)).index_add(0, rows.sequences, entropies)
    return SequenceScores(sums, rows.lengths, entropy_sums / rows.lengths / compute_max_entropy(vocab_size))


def _compute_hidden_states(model: PreTrainedModel, rows: Rows, settings: _PassSettings) -> Tensor:
    """Compute (R, T, d) last hidden states; plain rows need no mask, as a causal model is padded right."""
    decoder, inputs = find_decoder(model), {"input_ids": rows.input_ids, "use_cache": False}
    if settings.rope_switch is not None and not rows.shared:
        return _compute_in_two_passes(decoder, rows, settings.rope_switch, settings.equal_passes)
    if rows.shared:
        inputs |= {"attention_mask": _build_attention_mask(model, rows), "position_ids": rows.position_ids}
    hidden: Tensor = decoder(**inputs)[0]
    return hidden


def _compute_in_two_passes(decoder: nn.Module, rows: Rows, switch: int, equal_passes: bool) -> Tensor:
    """Compute the hidden states of rows up to `switch` tokens and of longer ones in a pass each.

    A decoder chooses the rotary frequencies of all its rows by the width of the longest. The response's last
    token is no input but counts as one of the row's tokens.
    """
    ids, width = rows.input_ids, rows.input_ids.shape[1]
    is_long = [count + 1 > switch for count in rows.row_lengths]
    passes = [
        ([i for i, long in enumerate(is_long) if not long], 1, min(width, switch)),
        ([i for i, long in enumerate(is_long) if long], switch + 1, width),
    ]
    states: Tensor | None = None
    for places, least, most in passes:
        if not places and not equal_passes:
            continue
        chosen = torch.tensor(places, dtype=torch.long, device=ids.device)
        part = ids.index_select(0, chosen)[:, :most] if places else ids[:1, :1]
        part = F.pad(part, (0, max(least - part.shape[1], 0) if places else 0))
        hidden: Tensor = decoder(input_ids=part, use_cache=False)[0]
        if states is None:
            states = hidden.new_zeros(*ids.shape, hidden.shape[-1])
        if not places:  # no row of this rank, but a pass of all ranks, backward too
            states = states + 0.0 * hidden.sum()
            continue
        hidden = F.pad(hidden[:, :width], (0, 0, 0, max(width - hidden.shape[1], 0)))
        states = states.index_add(0, chosen, hidden)
    assert states is not None
    return states


def _build_attention_mask(model: PreTrainedModel, rows: Rows) -> Tensor | BlockMask:
    """Build the shared layout's mask in the form that the model's attention takes."""
    kind = model.config._attn_implementation
    if kind == "flex_attention":
        segments, width = rows.segments, rows.input_ids.shape[1]

        def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = segments[row, key]
            return (query >= key) & ((own == 0) | (own == segments[row, query]))

        return create_block_mask(
            visible, rows.input_ids.shape[0], None, width, width, device=str(segments.device)
        )
    mask = rows.build_mask()
    if kind == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )


def _select_checked_head(model: PreTrainedModel) -> Head:
    """Select the head; refuse a model whose own log-probs it does not reproduce on padded random rows."""
    try:
        return _compare_with_logits(model)
    except (torch.OutOfMemoryError, ModelError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(
            f"{model.name_or_path or type(model).__name__} ({model.config.model_type}) cannot be scored: a "
            f"few tokens do not go through its decoder and head ({type(error).__name__}: {reason}); use a "
            "causal language model that reads text alone"
        ) from error


def _compare_with_logits(model: PreTrainedModel) -> Head:
    name = model.name_or_path or type(model).__name__
    flex = model.config._attn_implementation == "flex_attention"
    # With a GPU, the model may be here only to be sharded onto it; `models.parallel.prepare_parallel` checks
    # again.
    if flex and model.device.type == "cpu" and not torch.cuda.is_available():
        raise ModelError(
            f"{name}: attention: flex has no backward pass on a CPU; set attention: sdpa, or run on a GPU"
        )
    prompt, responses = _build_probe(model)
    groups = [PromptWithResponses(prompt, [responses[0]]), PromptWithResponses(prompt[:1], [responses[2]])]
    with _switch_to_eval(model):
        head, slow = select_head(model)
        found = _score_probe(model, head, groups, shared=False)
        expected = torch.stack([_score_from_logits(model, g.prompt, g.responses[0]) for g in groups])
    per_token = (found - expected).abs().max().item() / len(responses[0])
    if not per_token <= _get_tolerance(model):
        raise ModelError(
            f"{name} ({model.config.model_type}): log-probs from its hidden states differ from its logits by "
            f"{per_token:.2g} nats per token, so it cannot be scored; use a causal language model whose "
            "forward is decoder, then head"
        )
    if slow is not None:
        log.info("%s: the lm head runs through the model's own forward, because %s", name, slow)
    return head


def _score_probe(
    model: PreTrainedModel, head: Head, groups: list[PromptWithResponses], *, shared: bool
) -> Tensor:
    rows = build_rows(groups, shared=shared, pad_id=0).to(model.device)
    settings = _PassSettings.from_model(model)
    return _score_rows(model, head, rows, chunk_tokens=1024, entropy=False, settings=settings).logps


def _score_from_logits(model: PreTrainedModel, prompt: Any, response: Any) -> Tensor:
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logps.gather(-1, ids[0, len(prompt) :, None]).sum()


def _reason_from_probe(model: PreTrainedModel) -> str | None:
    """Score two equal responses and another after one prompt: a leak makes the second copy likelier."""
    prompt, responses = _build_probe(model)
    group = [PromptWithResponses(prompt, responses)]
    kind = model.config.model_type
    head, _ = select_head(model)
    try:
        shared, plain = (_score_probe(model, head, group, shared=s) for s in (True, False))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"{kind} does not take a block mask with own positions ({type(error).__name__}: {error})"
    per_token = (shared - plain).abs().max().item() / len(responses[0])
    if not per_token <= _get_tolerance(model):
        return f"{kind} gives other log-probs with a shared prompt (by {per_token:.2g} nats per token)"
    return None


def _build_probe(model: PreTrainedModel) -> tuple[list[int], list[list[int]]]:
    """Return a prompt of 5 and responses of 8, 8 (the same again) and 8 random tokens."""
    head = model.get_output_embeddings()
    vocabulary = min(m.weight.shape[0] for m in (model.get_input_embeddings(), head) if m is not None)
    ids = torch.randint(0, vocabulary, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids[:5], [ids[5:13], ids[5:13], ids[13:]]


def _get_tolerance(model: PreTrainedModel) -> float:
    return _TOLERANCE if torch.finfo(model.dtype).bits >= 32 else _TOLERANCE_16_BIT


@contextmanager
def _switch_to_eval(module: nn.Module) -> Iterator[None]:
    """Disable gradients and switch to eval mode; the modes of all modules are restored afterwards."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
