"""The command `polyref label`: soft labels for pairs, made by judges."""

from typing import Annotated
from urllib.parse import urlsplit

import typer

from orchestrator.cli.interruption import turn_ctrl_c_into_interruption
from orchestrator.errors import UsageError


def label_command(
    source: Annotated[
        str,
        typer.Argument(help="File, folder, URI or hub data set of pairs; or a run file, for its data.train."),
    ],
    to: Annotated[str, typer.Option(help="The Parquet file to write.", metavar="OUT.parquet")],
    judge: Annotated[
        list[str] | None,
        typer.Option(help="A language model, or MODEL=WEIGHT; repeatable.", metavar="MODEL"),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="A reward model (one output), or MODEL=WEIGHT; repeatable.", metavar="MODEL"),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="Base URL of an OpenAI-compatible endpoint; its key: OPENAI_API_KEY.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="The endpoint's model, or MODEL=WEIGHT.", metavar="MODEL")
    ] = None,
    template: Annotated[
        str, typer.Option(help="helpfulness, harmlessness, summary, or a file.")
    ] = "helpfulness",
    answers: Annotated[str, typer.Option(help="The two one-token answers.")] = "A,B",
    temperature: Annotated[
        float, typer.Option(help="Differences of log-probs and rewards are divided by it.")
    ] = 1.0,
    votes: Annotated[
        int, typer.Option(help="Endpoint: answers sampled per question, instead of log-probs.", min=0)
    ] = 0,
    rate_limit: Annotated[float | None, typer.Option(help="Endpoint: most requests per minute.")] = None,
    concurrency: Annotated[int, typer.Option(help="Endpoint: open requests.", min=1)] = 8,
    limit: Annotated[int | None, typer.Option(help="Label the first N pairs only.", min=1)] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data set; default: train.")] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    storage_path: Annotated[
        str | None, typer.Option(help="Where scores and answers are kept; default: the run file's, or runs.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Copies of each local judge.", min=1)] = 1,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, instead of stopping.")
    ] = False,
) -> None:
    """Label pairs with soft labels by AI feedback; the same command resumes where it was killed."""
    from orchestrator.labels.label import label_pairs
    from orchestrator.labels.settings import (
        EndpointSettings,
        LabelSettings,
        check_output,
        parse_answers,
        parse_judges,
        read_source,
    )
    from orchestrator.labels.templates import load_template

    _check_endpoint_options(judge_url, judge_model)
    for option, value in (("--temperature", temperature), ("--rate-limit", rate_limit)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{option} must be above 0, got {value:g}")
    found = read_source(source, split=split, subset=subset, storage_path=storage_path)
    endpoint = judge_url and EndpointSettings(judge_url, votes, rate_limit, concurrency)
    settings = LabelSettings(
        sources=found.sources,
        storage_path=found.storage_path,
        tracking_uri=found.tracking_uri,
        output=check_output(to),
        judges=parse_judges(judge or (), reward or (), judge_model),
        template=load_template(template),
        answers=parse_answers(answers),
        temperature=temperature,
        endpoint=endpoint or None,
        limit=limit,
        replicas=replicas,
        on_bad_row="skip" if skip_bad_rows else found.on_bad_row,
    )
    with turn_ctrl_c_into_interruption():
        label_pairs(settings)


def _check_endpoint_options(url: str | None, model: str | None) -> None:
    """Refuse an endpoint without its model, and the other way round."""
    if url is not None and not _is_web_address(url):
        raise UsageError(f"--judge-url {url}: give a URL such as http://127.0.0.1:8000/v1")
    if (url is None) != (model is None):
        missing = "--judge-model" if model is None else "--judge-url"
        raise UsageError(f"{missing} is missing; an endpoint needs --judge-url URL and --judge-model NAME")


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        return False
