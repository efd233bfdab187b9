"""Rows -> log-prob, length and mean entropy of every response, exactly as `model(...).logits` gives them.

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
from models.head import Head, ReplayedHead, head_of, max_entropy
from models.rows import Prompted, Rows, build_rows

log = logging.getLogger(__name__)

# Nats per token by which a probe may miss. Norms and softmax round to float32 even in a float64 model; what a
# leak between the probe's equal responses gives is far above the noise of bfloat16 and float16.
_TOLERANCE, _TOLERANCE_LOW = 1e-3, 0.15
_ALIBI = frozenset({"bloom", "mpt"})
_refusals: "WeakKeyDictionary[PreTrainedModel, str | None]" = WeakKeyDictionary()


class SequenceScores(NamedTuple):
    """One entry per response.

    logps:   (S,) summed over response tokens, nats.
    lengths: (S,) int64, response tokens.
    entropy: (S,) mean over response tokens / log V, in [0, 1], without gradient; None where not asked for.
    """

    logps: Tensor
    lengths: Tensor
    entropy: Tensor | None


class Scorer(nn.Module):
    """Log-probs of responses under one causal language model.

    `model` keeps its dtype, adapter and mode (train or eval); sums are float32, or float64 for a float64
    model. `chunk_tokens` response tokens at a time meet the head: memory is chunk_tokens x V floats.
    Raises ModelError where the model's logits do not follow from its decoder's hidden states.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, chunk_tokens: int = 1024) -> None:
        super().__init__()
        if chunk_tokens < 1:
            raise ModelError(f"chunk_tokens must be at least 1, got {chunk_tokens}; try 1024")
        self.model = model
        self.chunk_tokens = chunk_tokens
        causal = causal_model(model)
        self._head = _checked_head(causal)
        self.sharing_refusal = sharing_refusal(model)
        self._sizes = _Sizes.of(causal)

    def forward(self, rows: Rows, *, entropy: bool = False) -> SequenceScores:
        """Score every sequence of `rows`, which must lie on the model's device."""
        if rows.shared and self.sharing_refusal is not None:
            raise ModelError(
                f"prefix sharing is not exact for this model: {self.sharing_refusal}; build plain rows"
            )
        return _score(
            causal_model(self.model), self._head, rows, chunk_tokens=self.chunk_tokens, entropy=entropy
        )

    @property
    def head_weights(self) -> list[nn.Parameter]:
        """Weights that are used behind the decoder, in an order that is the same on every rank."""
        causal = causal_model(self.model)
        inside = {id(weight) for weight in causal.get_decoder().parameters()}
        outside = [weight for weight in causal.parameters() if id(weight) not in inside]
        head = causal.get_output_embeddings()
        tied = [] if head is None else [weight for weight in head.parameters() if id(weight) in inside]
        return outside + tied

    def keep_in_step(self, most: Callable[[int], int]) -> None:
        """For where a forward pass of any module is a collective: have all ranks run as many.

        `most` gives the largest of the ranks' numbers.
        """
        if isinstance(self._head, ReplayedHead):
            self._head = replace(self._head, most=most)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """(R, T) token ids -> (R, T, V) the model's own logits."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def generate(self, ids: Tensor, **settings: Any) -> Tensor:
        """(R, T) prompts -> (R, T + new): what the model writes behind them, as `generate` is told."""
        written: Tensor = causal_model(self.model).generate(ids, **settings)
        return written

    def forward_flops(self, rows: Rows) -> float:
        """Floating-point operations of one forward pass over `rows`, an estimate for utilisation figures.

        2 per weight of a matrix that a token meets (the head: response tokens only; experts: the share a
        token is sent to), plus 4 per head width and attended (query, key) pair. Norms, embeddings and padding
        do not count. A backward pass is twice that when every weight is trained, about once with a frozen
        base.
        """
        sizes = self._sizes
        matrices = 2.0 * (sizes.body * rows.tokens + sizes.head * rows.response_tokens)
        return matrices + 4.0 * sizes.attention * rows.attended


def causal_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model itself, adapters in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def sharing_refusal(model: PreTrainedModel | PeftModel) -> str | None:
    """Why computing a prompt once for several responses is not exact for `model`; None where it is.


    Known causes are read from the config; what remains is tried out on a few random tokens.
    """
    causal = causal_model(model)
    if causal not in _refusals:
        with _frozen(causal):
            refusal = _refusal_by_config(causal) or _refusal_by_probe(causal)
        if refusal is not None:
            log.info("%s: prompts are not shared between responses: %s", causal.name_or_path, refusal)
        _refusals[causal] = refusal
    return _refusals[causal]


def _score(
    model: PreTrainedModel, head: Head, rows: Rows, *, chunk_tokens: int, entropy: bool
) -> SequenceScores:
    states = _hidden(model, rows).flatten(0, 1).index_select(0, rows.predictors)
    logps, spread, width = head(states, rows.targets, chunk_tokens=chunk_tokens, entropy=entropy)
    sums = logps.new_zeros(len(rows.lengths)).index_add(0, rows.sequences, logps)
    if spread is None:
        return SequenceScores(sums, rows.lengths, None)
    spreads = spread.new_zeros(len(rows.lengths)).index_add(0, rows.sequences, spread)
    return SequenceScores(sums, rows.lengths, spreads / rows.lengths / max_entropy(width))


def _hidden(model: PreTrainedModel, rows: Rows) -> Tensor:
    """(R, T, d) last hidden states. Plain rows need no mask: padding is on the right of a causal model."""
    inputs: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": False}
    if rows.shared:
        inputs |= {"attention_mask": _attention_mask(model, rows), "position_ids": rows.position_ids}
    return model.get_decoder()(**inputs)[0]


def _attention_mask(model: PreTrainedModel, rows: Rows) -> Tensor | BlockMask:
    """The shared layout's mask in the form the model's attention takes."""
    kind = model.config._attn_implementation
    if kind == "flex_attention":
        segments, width = rows.segments, rows.input_ids.shape[1]

        def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = segments[row, key]
            return (query >= key) & ((own == 0) | (own == segments[row, query]))

        return create_block_mask(
            visible, rows.input_ids.shape[0], None, width, width, device=str(segments.device)
        )
    mask = rows.mask()
    if kind == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )


def _checked_head(model: PreTrainedModel) -> Head:
    """The head to use, after decoder and head have given the model's own log-probs on padded random rows."""
    name = model.name_or_path or type(model).__name__
    flex = model.config._attn_implementation == "flex_attention"
    # With a GPU here, the model may be on its way there in shards; `models.parallel.prepare` looks again.
    if flex and model.device.type == "cpu" and not torch.cuda.is_available():
        raise ModelError(
            f"{name}: attention: flex has no backward pass on a CPU; set attention: sdpa, or run on a GPU"
        )
    prompt, responses = _probe(model)
    groups = [Prompted(prompt, [responses[0]]), Prompted(prompt[:1], [responses[2]])]
    with _frozen(model):
        head, slow = head_of(model)
        found = _probe_scores(model, head, groups, shared=False)
        expected = torch.stack([_plain_score(model, g.prompt, g.responses[0]) for g in groups])
    per_token = (found - expected).abs().max().item() / len(responses[0])
    if not per_token <= _tolerance(model):
        raise ModelError(
            f"{name} ({model.config.model_type}): log-probs from its hidden states differ from its logits by "
            f"{per_token:.2g} nats per token, so it cannot be scored; use a causal language model whose "
            "forward is decoder, then head"
        )
    if slow is not None:
        log.info("%s: the lm head runs through the model's own forward, because %s", name, slow)
    return head


def _probe_scores(model: PreTrainedModel, head: Head, groups: list[Prompted], *, shared: bool) -> Tensor:
    rows = build_rows(groups, shared=shared, pad_id=0).to(model.device)
    return _score(model, head, rows, chunk_tokens=1024, entropy=False).logps


def _plain_score(model: PreTrainedModel, prompt: Any, response: Any) -> Tensor:
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logps.gather(-1, ids[0, len(prompt) :, None]).sum()


def _refusal_by_config(model: PreTrainedModel) -> str | None:
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


def _refusal_by_probe(model: PreTrainedModel) -> str | None:
    """Two equal responses and another behind one prompt: a leak between them makes the copy likelier."""
    prompt, responses = _probe(model)
    group = [Prompted(prompt, responses)]
    kind = model.config.model_type
    head, _ = head_of(model)
    try:
        shared, plain = (_probe_scores(model, head, group, shared=s) for s in (True, False))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"{kind} does not take a block mask with own positions ({type(error).__name__}: {error})"
    per_token = (shared - plain).abs().max().item() / len(responses[0])
    if not per_token <= _tolerance(model):
        return f"{kind} gives other log-probs with a shared prompt (by {per_token:.2g} nats per token)"
    return None


def _probe(model: PreTrainedModel) -> tuple[list[int], list[list[int]]]:
    """A prompt of 5 and responses of 8, 8 (the same again) and 8 random tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids[:5], [ids[5:13], ids[5:13], ids[13:]]


def _tolerance(model: PreTrainedModel) -> float:
    return _TOLERANCE if torch.finfo(model.dtype).bits >= 32 else _TOLERANCE_LOW


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients and eval mode; the modes of all modules are put back after."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


class _Sizes(NamedTuple):
    """Weights a token meets in the body and in the head; layers x heads x head width for attention."""

    body: float
    head: float
    attention: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> "_Sizes":
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
                # Quantised layers pack their weights: count what the layer says, not what it stores.
                size = _linear_size(module) if dense else weight.numel()
                body += size * (share if ".experts" in name else 1.0)
        heads = getattr(config, "num_attention_heads", 0)  # a purely recurrent model has none
        width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        return cls(body, float(_linear_size(head)), float(config.num_hidden_layers * heads * width))


def _linear_size(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return sum(p.numel() for p in layer.parameters() if p.dim() >= 2)
