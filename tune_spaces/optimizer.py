"""Named space `optimizer`: how fast the policy learns."""

from tune_spaces.domains import LogUniform, Uniform
from tune_spaces.draft import Draft


def optimizer(draft: Draft) -> None:
    """Draw learning rate, warm-up and weight decay, which suit no loss in particular.

    The learning rate spans full fine-tuning (5e-7 to 1e-6 for 7 to 8 billion parameters: MallowsPO, SimPO) to
    small adapters (1e-5 in MRPO, up to 1e-4 in common use); narrow it where the policy is known. MallowsPO
    warms up over 0.1 of the steps.
    """
    draft.draw("training.learning_rate", LogUniform(low=5e-7, high=1e-4))
    draft.draw("training.warmup", Uniform(low=0, high=0.2))
    draft.draw("training.weight_decay", Uniform(low=0, high=0.1))
