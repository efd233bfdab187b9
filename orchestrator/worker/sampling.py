"""Samples of the policy: their KL to the references, and their rewards.

log pi(y|x) - log ref(y|x) of a response y drawn from the policy is an unbiased estimate of
KL(pi(.|x) || ref(.|x)) in nats per response; its mean over held-out prompts is reported.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from models.config import ModelError
from models.logprobs import get_causal_model
from models.rows import PromptWithResponses, build_rows
from orchestrator.config.sections import SamplingConfig
from orchestrator.references.client import ReferenceClient
from orchestrator.references.messages import Ids, PromptGroup
from orchestrator.references.store import digest_response
from orchestrator.worker.policy import Policy
from orchestrator.worker.rewards import RewardScorer
from preferences.split import TokenizedSplit
from preferences.tokens.tables import RaggedArray, Rows

PROMPTS_PER_CHUNK = 8
"""Prompts sampled in one batch, for any number of ranks: padding is then the same, and so are samples."""


class Sampler:
    """Measures the policy on responses that it generates to the first held-out prompts of the judged set.

    Args:
        config: number of prompts and length of responses.
        policy: this rank's.
        split: the held-out rows.
        rows: those whose prompts may be sampled, the first first; a prompt in several of them counts once.
        client: requests the served references' scores.
        names: all references, the primary first. Those that read other token ids than the policy (another
            tokenizer or chat template) get no KL.
        scored_by_workers: the references that `policy.score_initial_policy` scores.
        reward_scorer: gives rewards, if the run file sets a reward.
        rank, world_size: which share of the prompts is this rank's.
        seed: the training seed; samples depend on it, the step and the prompts, and not on the ranks.

    Raises:
        ModelError: the policy has too few positions for such long responses, or a KL budget is set and the KL
            to the primary cannot be measured.
    """

    def __init__(
        self,
        config: SamplingConfig,
        policy: Policy,
        split: TokenizedSplit,
        rows: Rows,
        client: ReferenceClient,
        names: Sequence[str],
        scored_by_workers: Collection[str],
        reward_scorer: RewardScorer | None,
        rank: int,
        world_size: int,
        *,
        seed: int,
    ) -> None:
        self.config = config
        self._policy, self._client, self._reward_scorer = policy, client, reward_scorer
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._prompts = _drop_repeats(split.policy.prompts.take(rows))[: config.prompts]
        self._new_tokens = config.max_new_tokens
        self._names = [name for name in names if split.policy.has_same_ids(split.references[name])]
        self._served = [name for name in self._names if name not in scored_by_workers]
        self._scored_by_workers = [name for name in self._names if name in scored_by_workers]
        self._model = get_causal_model(policy.scorer.model)
        self._end_tokens = _find_end_tokens(self._model, policy.tokenizer)
        self._refuse_too_few_positions()
        if config.kl_budget is not None and self._names[:1] != list(names[:1]):
            raise ModelError(
                f"evaluation.sampling.kl_budget: the primary reference {names[0]!r} reads other token ids "
                "than the policy (another tokenizer or chat template), so the KL to it cannot be measured; "
                "make a reference with the policy's tokenizer the primary, or leave kl_budget out"
            )

    def measure_policy(self, step: int, report: Callable[[int, int], None] | None = None) -> dict[str, float]:
        """Sample responses and compute means over the samples of all ranks.

        `report` is called with about how many samples there are on all ranks, and how many there will be.

        Every rank calls it and gets the same means: `eval/kl/<reference>` in nats per response, `eval/reward`
        with a reward scorer, `eval/samples/length` in tokens with the end token.
        """
        parallel = self._policy.parallel
        parallel.module.eval()
        try:
            values = self._measure_share(step, report)
        finally:
            parallel.module.train()
        # A sample has one row, filled by one rank: the sum is exact for any number of ranks.
        means = parallel.all_reduce_sum(values.to(parallel.device)).mean(dim=0).tolist()
        return dict(zip(self._column_names, means, strict=True))

    @property
    def _column_names(self) -> list[str]:
        reward = [] if self._reward_scorer is None else ["eval/reward"]
        return [*(f"eval/kl/{name}" for name in self._names), *reward, "eval/samples/length"]

    @torch.no_grad()
    def _measure_share(self, step: int, report: Callable[[int, int], None] | None) -> Tensor:
        """Sample this rank's share: (prompts, columns) float64, zeros in the rows of other ranks."""
        table = np.zeros((len(self._prompts), len(self._column_names)))
        column = {name: table[:, index] for index, name in enumerate(self._column_names)}
        logps: dict[int, np.ndarray] = {}
        starts = range(
            self._rank * PROMPTS_PER_CHUNK, len(self._prompts), self._world_size * PROMPTS_PER_CHUNK
        )
        for start in starts:
            chunk = slice(start, start + PROMPTS_PER_CHUNK)
            prompts = self._prompts[chunk]
            if report is not None:
                report(start, len(self._prompts))  # ranks take chunks in turn, so others are as far
            responses = self._sample_responses(prompts, [self._seed, step, start])
            # References score these samples while the next chunk is sampled.
            self._client.request_sample_scores(start, _build_groups(prompts, responses), self._served)
            logps[start], initial_logps = self._compute_log_probs(prompts, responses)
            for name in self._scored_by_workers:
                column[f"eval/kl/{name}"][chunk] = logps[start] - initial_logps
            if self._reward_scorer is not None:
                texts = self._decode_samples(prompts, responses)
                column["eval/reward"][chunk] = self._reward_scorer.score(*texts)
            column["eval/samples/length"][chunk] = [len(response) for response in responses]
        for start in starts:
            for name, scores in self._client.collect_sample_scores(start).items():
                column[f"eval/kl/{name}"][start : start + PROMPTS_PER_CHUNK] = logps[start] - scores.logps
        self._run_idle_chunks(step, done=len(starts))
        return torch.from_numpy(table)

    def _run_idle_chunks(self, step: int, *, done: int) -> None:
        """Run as many chunks as the other ranks, discarding them, where a forward pass is a collective.

        Args:
            step: optimizer steps taken.
            done: chunks that this rank has run.
        """
        if self._policy.parallel.sharded:
            chunks = math.ceil(len(self._prompts) / PROMPTS_PER_CHUNK)
            for _ in range(math.ceil(chunks / self._world_size) - done):
                prompts = self._prompts[:PROMPTS_PER_CHUNK]
                self._compute_log_probs(prompts, self._sample_responses(prompts, [self._seed, step, 0]))

    def _sample_responses(self, prompts: Sequence[Ids], seed: Sequence[int]) -> list[Ids]:
        """Draw a response to each prompt from the policy's unmodified distribution."""
        width, device = max(map(len, prompts)), self._policy.parallel.device
        ids = np.full((len(prompts), width), self._policy.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self._new_tokens,
            eos_token_id=self._end_tokens or None,
            pad_token_id=self._policy.pad_id,
            use_cache=True,
        )
        with _disable_generation_defaults(self._model), _fork_seed(seed, device):
            out = self._policy.scorer.generate(
                torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                generation_config=config,
                synced_gpus=self._policy.parallel.sharded,
            )
        return [self._cut_at_end(row) for row in out[:, width:].cpu().numpy().astype(np.int32)]

    def _cut_at_end(self, response: Ids) -> Ids:
        """Return the response up to and including its first end token."""
        ends = np.flatnonzero(np.isin(response, self._end_tokens))
        return response[: ends[0] + 1] if len(ends) else response

    def _compute_log_probs(
        self, prompts: Sequence[Ids], responses: Sequence[Ids]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Compute the responses' log-probs under the policy and under the initial policy.

        The latter are None without a reference that is scored in process.
        """
        groups = [PromptWithResponses(p, [r]) for p, r in zip(prompts, responses, strict=True)]
        rows = build_rows(groups, shared=False, pad_id=self._policy.pad_id).to(self._policy.parallel.device)
        logps = _to_numpy(self._policy.scorer(rows).logps)
        return logps, _to_numpy(
            self._policy.score_initial_policy(rows).logps
        ) if self._scored_by_workers else None

    def _decode_samples(
        self, prompts: Sequence[Ids], responses: Sequence[Ids]
    ) -> tuple[list[str], list[str]]:
        """Decode prompts and responses to texts."""
        prompt_texts = [self._decode_ids(prompt) for prompt in prompts]
        texts = [self._decode_ids(np.concatenate(pair)) for pair in zip(prompts, responses, strict=True)]
        # Responses are not decoded alone: some tokenizers drop a text's leading space.
        return prompt_texts, [
            text.removeprefix(prompt) for text, prompt in zip(texts, prompt_texts, strict=True)
        ]

    def _decode_ids(self, ids: Ids) -> str:
        tokenizer = self._policy.tokenizer
        return str(
            tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _refuse_too_few_positions(self) -> None:
        """Raise ModelError if the longest prompt and its response exceed the policy's positions."""
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, self._prompts))
        if positions is not None and longest + self._new_tokens > positions:
            raise ModelError(
                f"evaluation.sampling.max_new_tokens: a prompt of {longest} tokens and {self._new_tokens} "
                f"new ones are more than the policy's {positions} positions; set it to at most "
                f"{positions - longest}, or lower data.max_prompt_length"
            )


def _drop_repeats(prompts: RaggedArray) -> list[Ids]:
    """Return the prompts in their order, each once."""
    return list({row.tobytes(): row for row in prompts}.values())


def _find_end_tokens(model: PreTrainedModel, tokenizer: object) -> list[int]:
    """Return the token ids that end a response: the tokenizer's, and those the model was published with."""
    own = model.generation_config.eos_token_id
    ids = {getattr(tokenizer, "eos_token_id", None), *(own if isinstance(own, list) else [own])}
    return sorted(int(i) for i in ids if i is not None)


def _build_groups(prompts: Sequence[Ids], responses: Sequence[Ids]) -> list[PromptGroup]:
    pairs = zip(prompts, responses, strict=True)
    return [
        PromptGroup(prompt, [response], [digest_response(prompt, response)]) for prompt, response in pairs
    ]


def _to_numpy(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


@contextmanager
def _disable_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Disable the sampling settings that a model is published with (a repetition penalty, say).

    `generate` merges them into the config that is passed to it, and samples would not follow the policy's
    distribution.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _fork_seed(seed: Sequence[int], device: torch.device) -> Iterator[None]:
    """Draw random numbers in this block from `seed` alone, without changing those drawn after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        yield
