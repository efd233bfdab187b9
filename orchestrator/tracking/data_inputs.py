"""The data of a run as MLflow's page of it names them: name, digest, number of rows and use."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.redaction import hide_secrets, redact

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

_DIGEST_LENGTH, _NAME_LENGTH = 12, 500  # MLflow takes 36 characters of a digest, and shows them all


@dataclass(frozen=True)
class TrackedData:
    """Training or held-out data.

    Attributes:
        name: its sources, without paths.
        used_for: what it is used for.
        digest: of its rows' content.
        rows: number of its pairs.
        source_type: a kind that MLflow knows (`hugging_face`, `local`), or `mixture`.
        source: where it is from, with the fields that MLflow expects of the kind.
    """

    name: str
    used_for: Literal["training", "evaluation"]
    digest: str
    rows: int
    source_type: str
    source: Mapping[str, Any] = field(default_factory=dict)


def build_dataset_inputs(data: Sequence[TrackedData]) -> "list[DatasetInput]":
    """Build what `MlflowClient.log_inputs` takes; it has no row of the data."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(
                name=redact(one.name)[:_NAME_LENGTH],
                digest=one.digest[:_DIGEST_LENGTH],
                source_type=one.source_type,
                source=json.dumps(hide_secrets(one.source)),
                profile=json.dumps({"num_rows": one.rows}),
            ),
            [InputTag("mlflow.data.context", one.used_for)],
        )
        for one in data
    ]
