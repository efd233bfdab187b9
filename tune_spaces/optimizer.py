"""Named space `optimizer`: learning rate, warm-up and weight decay."""

from tune_spaces.domains import LogUniform, Uniform
from tune_spaces.draft import PointDraft


def draw_optimizer_settings(draft: PointDraft) -> None:
    """Draw learning rate, warm-up and weight decay, from the same ranges for all losses.

    The learning rate spans full fine-tuning (5e-7 to 1e-6 for 7 to 8 billion parameters: MallowsPO, SimPO) to
    small adapters (1e-5 in MRPO, up to 1e-4 in common use); narrow it if the policy is known. MallowsPO
    warms up over 0.1 of the steps.
    """
    draft.draw_field("training.learning_rate", LogUniform(low=5e-7, high=1e-4))
    draft.draw_field("training.warmup", Uniform(low=0, high=0.2))
    draft.draw_field("training.weight_decay", Uniform(low=0, high=0.1))
