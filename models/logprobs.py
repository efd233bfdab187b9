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
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.config import ModelError
from models.head import Head, ModelForwardHead, compute_max_entropy, select_head
from models.rows import PromptWithResponses, Rows, build_rows

log = logging.getLogger(__name__)

# Accepted error of a probe in nats per token. Norms and softmax round to float32 even in a float64 model; a
# leak between the probe's equal responses gives an error far above the noise of bfloat16 and float16.
_TOLERANCE, _TOLERANCE_16_BIT = 1e-3, 0.15
_ALIBI = frozenset({"bloom", "mpt"})
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
        self._sizes = _ModelSizes.from_model(causal)

    def forward(self, rows: Rows, *, entropy: bool = False) -> SequenceScores:
        """Score every sequence of `rows`, which must be on the model's device."""
        reason = self.prefix_sharing_unavailable_reason
        if rows.shared and reason is not None:
            raise ModelError(f"prefix sharing is not exact for this model: {reason}; build plain rows")
        return _score_rows(
            get_causal_model(self.model), self._head, rows, chunk_tokens=self.chunk_tokens, entropy=entropy
        )

    @property
    def head_weights(self) -> list[nn.Parameter]:
        """Weights that are used after the decoder, in an order that is the same on every rank."""
        causal = get_causal_model(self.model)
        inside = {id(weight) for weight in causal.get_decoder().parameters()}
        outside = [weight for weight in causal.parameters() if id(weight) not in inside]
        head = causal.get_output_embeddings()
        tied = [] if head is None else [weight for weight in head.parameters() if id(weight) in inside]
        return outside + tied

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
            reason = _reason_from_config(causal) or _reason_from_probe(causal)
        if reason is not None:
            log.info("%s: prompts are not shared between responses: %s", causal.name_or_path, reason)
        _sharing_reasons[causal] = reason
    return _sharing_reasons[causal]


def _score_rows(
    model: PreTrainedModel, head: Head, rows: Rows, *, chunk_tokens: int, entropy: bool
) -> SequenceScores:
    states = _compute_hidden_states(model, rows).flatten(0, 1).index_select(0, rows.predictors)
    logps, entropies, vocab_size = head(states, rows.targets, chunk_tokens=chunk_tokens, entropy=entropy)
    sums = logps.new_zeros(len(rows.lengths)).index_add(0, rows.sequences, logps)
    if entropies is None:
        return SequenceScores(sums, rows.lengths, None)
    entropy_sums = entropies.new_zeros(len(rows.lengths)).index_add(0, rows.sequences, entropies)
    return SequenceScores(sums, rows.lengths, entropy_sums / rows.lengths / compute_max_entropy(vocab_size))


def _compute_hidden_states(model: PreTrainedModel, rows: Rows) -> Tensor:
    """Compute (R, T, d) last hidden states; plain rows need no mask, as a causal model is padded right."""
    inputs: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": False}
    if rows.shared:
        inputs |= {"attention_mask": _build_attention_mask(model, rows), "position_ids": rows.position_ids}
    return model.get_decoder()(**inputs)[0]


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
    return _score_rows(model, head, rows, chunk_tokens=1024, entropy=False).logps


def _score_from_logits(model: PreTrainedModel, prompt: Any, response: Any) -> Tensor:
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logps.gather(-1, ids[0, len(prompt) :, None]).sum()


def _reason_from_config(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    rope = getattr(config, "rope_parameters", None) or {}
    if kinds:
        return f"{config.model_type} has layers of type {', '.join(sorted(kinds))}"
    if window is not None:
        return f"{config.model_type} has a sliding window of {window} tokens"
    if getattr(model, "_is_stateful", False):
        return f"{config.model_type} is recurrent: its state runs through the whole row"
    if config.model_type in _ALIBI or getattr(config, "alibi", False):
        return f"{config.model_type} has ALiBi attention, whose bias counts columns, not positions"
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return f"{config.model_type} scales its rotary positions by the row's length ({rope['rope_type']})"
    if model.config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
        return f"attention {model.config._attn_implementation} takes no block mask"
    return None


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
    vocabulary = model.get_input_embeddings().weight.shape[0]
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


class _ModelSizes(NamedTuple):
    """Weights that a token uses in the body and in the head; layers x heads x head width for attention."""

    body: float
    head: float
    attention: float

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> "_ModelSizes":
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
        share = (getattr(config, "num_experts_per_tok", None) or 1) / experts
        body = 0.0
        for name, module in model.named_modules():
            if module is head or isinstance(module, nn.Embedding):
                continue
            for key, weight in module.named_parameters(recurse=False):
                if weight.dim() < 2:
                    continue
                dense = isinstance(module, (nn.Linear, Conv1D)) and key == "weight"
                # Quantised layers pack their weights: count by the layer's features, not by what it stores.
                size = _count_layer_weights(module) if dense else weight.numel()
                body += size * (share if ".experts" in name else 1.0)
        heads = getattr(config, "num_attention_heads", 0)  # a purely recurrent model has none
        width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        return cls(body, float(_count_layer_weights(head)), float(config.num_hidden_layers * heads * width))


def _count_layer_weights(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return sum(p.numel() for p in layer.parameters() if p.dim() >= 2)
