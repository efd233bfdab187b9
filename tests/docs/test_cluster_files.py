"""The cluster files against Ray's own schema and command line, KubeRay's fields, and placement's roles."""

import configparser
import hashlib
import json
import re
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.cluster.nodes import NODE_TYPES
from orchestrator.cluster.placement import REFERENCE_ROLE, TRAINER_ROLE, refuse_impossible
from orchestrator.config.run import load_run, parse_run
from orchestrator.errors import UsageError

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "configs" / "clusters"
VM_FILES = [ROOT / "cluster.yaml", CLUSTERS / "gcp.yaml", CLUSTERS / "on-premises.yaml"]
CLOUD_FILES = VM_FILES[:2]
KUBERAY = CLUSTERS / "kuberay.yaml"
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def prepared(path: Path) -> dict[str, Any]:
    """As `ray up` reads it, with defaults and checked by Ray."""
    config = prepare_config(read(path))
    validate_config(config)
    return config


def lines(config: dict[str, Any]) -> Iterator[str]:
    for name in COMMANDS:
        yield from config.get(name, ())


def kubernetes() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KUBERAY.read_text()))


def ray_cluster() -> dict[str, Any]:
    """The spec that KubeRay makes a cluster of."""
    [job] = [document for document in kubernetes() if document["kind"] == "RayJob"]
    spec = job["spec"]["rayClusterSpec"]
    assert isinstance(spec, dict)
    return spec


def groups() -> list[dict[str, Any]]:
    return [ray_cluster()["headGroupSpec"], *ray_cluster()["workerGroupSpecs"]]


# ---- ray up ----


@pytest.mark.parametrize("path", VM_FILES, ids=of)
def test_ray_accepts_it(path: Path) -> None:
    prepared(path)


def test_a_wrong_cluster_file_would_be_seen() -> None:
    with pytest.raises(jsonschema.ValidationError, match="head_setup_comands"):
        validate_config(prepare_config(read(ROOT / "cluster.yaml") | {"head_setup_comands": []}))


@pytest.mark.parametrize("path", VM_FILES, ids=of)
def test_its_shell_commands_are_sound(path: Path) -> None:
    for line in lines(read(path)):
        checked = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True)
        assert checked.returncode == 0, f"{line}\n{checked.stderr}"
        assert "\n" not in line.strip(), "a line that was meant to be folded"


def ray_start(line: str) -> dict[str, Any] | None:
    """What Ray's own command line makes of the `ray start` in a line of shell, if there is one."""
    found = re.search(r"\bray start\b(.*)$", line, re.DOTALL)
    if found is None:
        return None
    text = re.sub(
        r"\"\$\(.*?\)\"", "'{}'", found[1], flags=re.DOTALL
    )  # resources that a file on the node names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray's own modules use
        from ray.scripts.scripts import cli
    command = cli.commands["start"]
    with command.make_context("start", shlex.split(text.replace("$RAY_HEAD_IP", "10.0.0.1"))) as context:
        return dict(context.params)


@pytest.mark.parametrize("path", VM_FILES, ids=of)
def test_its_nodes_start_ray_as_the_command_line_has_it(path: Path) -> None:
    config = read(path)
    heads = [ray_start(line) for line in config["head_start_ray_commands"]]
    [head] = [options for options in heads if options is not None]
    assert head["head"]
    assert head["autoscaling_config"].endswith("ray_bootstrap_config.yaml")
    assert head["dashboard_host"] == "127.0.0.1"
    [worker] = filter(None, map(ray_start, config["worker_start_ray_commands"]))
    assert worker["address"] == f"10.0.0.1:{head['port']}"
    assert "ray stop" in config["head_start_ray_commands"]
    assert "ray stop" in config["worker_start_ray_commands"]


def test_a_wrong_ray_start_would_be_seen() -> None:
    with pytest.raises(click.UsageError):
        ray_start("ulimit -n 65536; ray start --head --dashbord-host=127.0.0.1")


@pytest.mark.parametrize("path", CLOUD_FILES, ids=of)
def test_its_node_types_have_the_roles_that_placement_reads(path: Path) -> None:
    config = prepared(path)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"]["GPU"] == 0
    assert types["head"]["max_workers"] == 0
    assert not {REFERENCE_ROLE, TRAINER_ROLE} & set(types["head"]["resources"])
    assert types["references"]["resources"][REFERENCE_ROLE] == 1
    assert types["trainers"]["resources"][TRAINER_ROLE] == 1
    for name in ("references", "trainers"):
        assert types[name]["resources"]["GPU"] >= 1
        assert types[name]["min_workers"] == 0
        assert 0 < types[name]["max_workers"] <= config["max_workers"]
    spot = json.dumps(types["trainers"]["node_config"]).lower()
    assert "spot" in spot
    assert "spot" not in json.dumps([types["head"], types["references"]]).lower()


@pytest.mark.parametrize("path", CLOUD_FILES, ids=of)
def test_a_run_that_fits_when_all_nodes_have_started_is_placed(path: Path) -> None:
    types = prepared(path)["available_node_types"]
    nodes = [types["head"]["resources"]]
    for name in ("references", "trainers"):
        nodes += [types[name]["resources"]] * types[name]["max_workers"]
    run = {
        "name": "fits",
        "policy": {"model": "m"},
        "references": {"primary": "base", "models": {"base": {"model": "m", "replicas": 4}}},
        "data": {"train": "d"},
        "loss": {"preset": "dpo"},
    }
    refuse_impossible(parse_run({**run, "parallel": {"workers": 16}}, source="fits"), nodes)
    with pytest.raises(UsageError, match="worker"):
        refuse_impossible(parse_run({**run, "parallel": {"workers": 17}}, source="not"), nodes)


@pytest.mark.parametrize("path", VM_FILES, ids=of)
def test_it_brings_the_project_and_nothing_else(path: Path) -> None:
    mounts = read(path)["file_mounts"]
    token = mounts.pop("~/.ray/auth_token")
    assert token == "~/.ray/auth_token"
    assert all((ROOT / source).exists() for source in mounts.values())
    packages = {source for source in mounts.values() if (ROOT / source).is_dir()}
    wheel = re.search(r"^packages = (\[.*\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert wheel is not None
    assert packages == set(json.loads(wheel[1]))
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == set(mounts.values()) - packages
    assert "__pycache__" in read(path)["rsync_exclude"]


@pytest.mark.parametrize("path", CLOUD_FILES, ids=of)
def test_only_loopback_and_private_addresses_are_bound_and_the_token_is_asked_for(path: Path) -> None:
    text = "\n".join(lines(read(path)))
    assert "0.0.0.0" not in text
    assert re.search(r'mlflow server --app-name basic-auth --host "\$\(hostname -I', text)
    assert "RAY_AUTH_MODE=token" in text
    ingress = read(path)["provider"].get("security_group", {}).get("IpPermissions", [])
    assert ingress == []


@pytest.mark.parametrize("path", CLOUD_FILES, ids=of)
def test_its_registry_asks_for_the_token(path: Path, tmp_path: Path) -> None:
    """The very lines, with an MLflow that notes how it was started, and a `systemd-run` that starts it."""
    import mlflow
    from mlflow.cli import cli

    config, home = read(path), tmp_path / "home"
    program = 'env > "$HOME/environment"\nfor option; do echo "$option"; done > "$HOME/given"\n'
    systemd = 'echo "$@" > "$HOME/unit"\nwhile [ "${1#-}" != "$1" ]; do shift; done\n'
    systemd += 'exec env -i HOME="$HOME" PATH="$(dirname "$0"):/usr/bin:/bin" "$@"\n'
    for name, content in {
        "home/.ray/auth_token": "secret-token\n",
        "home/polyref/.venv/bin/mlflow": f"#!/bin/sh\n{program}",
        "home/polyref/registry/basic_auth.db": "of another token",
        "tools/sudo": '#!/bin/sh\n[ "$1" = systemctl ] && exit 5\nexec "$@"\n',
        "tools/systemd-run": f"#!/bin/sh\n{systemd}",
        "tools/hostname": "#!/bin/sh\necho 10.0.0.1 172.17.0.1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    [line] = [line for line in config["head_start_ray_commands"] if "mlflow" in line]
    line = line.replace("/shared/polyref", str(tmp_path / "shared"))
    shell = {"HOME": str(home), "PATH": f"{tmp_path / 'tools'}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", line], check=True, env=shell)
    assert (tmp_path / "shared/registry").is_dir()
    assert not (home / "polyref/registry/basic_auth.db").exists()
    assert "secret-token" not in (home / "unit").read_text() + (home / "polyref/registry/start").read_text()
    started = dict(row.split("=", 1) for row in (home / "environment").read_text().splitlines() if "=" in row)
    assert started["MLFLOW_AUTH_ADMIN_PASSWORD"] == hashlib.sha256(b"secret-token\n").hexdigest()
    assert len(started["MLFLOW_FLASK_SERVER_SECRET_KEY"]) == 44

    settings = configparser.ConfigParser()
    settings.read(home / "polyref/registry" / started["MLFLOW_AUTH_CONFIG_PATH"])
    shipped = configparser.ConfigParser()
    shipped.read(Path(mlflow.__file__).parent / "server/auth/basic_auth.ini")
    assert {**shipped["mlflow"], **settings["mlflow"]} == {
        **shipped["mlflow"],
        "auth_cache_ttl_seconds": "60",
    }
    assert settings["mlflow"].items() >= {**shipped["mlflow"]}.items() - {
        ("grant_default_workspace_access", "false")
    }

    server, *options = (home / "given").read_text().splitlines()
    with cli.commands[server].make_context(server, options) as context:
        given = context.params
    assert (given["app_name"], given["serve_artifacts"]) == ("basic-auth", True)
    assert (given["host"], given["port"], given["workers"]) == ("10.0.0.1", 5000, "1")
    assert given["backend_store_uri"] == f"sqlite:///{tmp_path}/shared/registry/mlflow.db"
    assert given["artifacts_destination"] == f"{tmp_path}/shared/registry/artifacts"
    assert any("'mlflow[auth]'" in line for line in config["head_setup_commands"])


@pytest.mark.parametrize("path", CLOUD_FILES, ids=of)
def test_what_is_to_be_filled_in_is_marked(path: Path) -> None:
    header, _, body = path.read_text().partition("cluster_name:")
    for mark in ("EDIT 1", "EDIT 2"):
        assert mark in header
        assert mark in body


def test_the_setup_of_a_node_installs_once_and_again_when_requirements_change(tmp_path: Path) -> None:
    """The very lines of cluster.yaml, with a Python that only notes that it was called."""
    home = tmp_path / "home"
    (home / "polyref").mkdir(parents=True)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("t")
    (home / ".ray" / "auth_token").chmod(0o644)
    (home / "polyref" / "pyproject.toml").write_text("one")
    (home / "polyref" / "constraints.txt").write_text("two")
    (tools := tmp_path / "tools").mkdir()
    (tools / "python3").write_text(
        "#!/bin/sh\nmkdir -p .venv/bin\n"
        "printf '#!/bin/sh\\necho \"$@\" >> calls\\n' > .venv/bin/pip\nchmod +x .venv/bin/pip\n"
    )
    (tools / "python3").chmod(0o755)

    def setup() -> list[str]:
        for line in read(ROOT / "cluster.yaml")["setup_commands"]:
            environment = {"HOME": str(home), "PATH": f"{tools}:/usr/bin:/bin"}
            subprocess.run(["bash", "-c", line], check=True, env=environment)
        return (home / "polyref" / "calls").read_text().splitlines()

    assert setup() == ["install --quiet --constraint constraints.txt --editable .[quantization]"]
    assert len(setup()) == 1
    (home / "polyref" / "constraints.txt").write_text("three")
    assert len(setup()) == 2
    assert (home / ".bashrc").read_text().count("polyref/environment") == 1
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o77 == 0
    shell = subprocess.run(
        ["bash", "-c", ". ~/.bashrc; env"],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert "RAY_AUTH_MODE=token" in shell.stdout
    assert "MLFLOW_TRACKING_USERNAME=admin\n" in shell.stdout
    password = hashlib.sha256(b"t").hexdigest()
    assert f"MLFLOW_TRACKING_PASSWORD={password}\n" in shell.stdout
    assert password not in (home / "polyref" / "environment").read_text()
    assert f"PATH={home}/polyref/.venv/bin:/usr/bin:/bin" in shell.stdout


def test_ray_starts_its_machines_on_a_simulated_aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `ray up` asks of AWS and the head afterwards, against moto: roles, networks, instances."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    (tmp_path / ".ssh").mkdir()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: None)  # AWS is given half a minute to spread a new role
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        config = prepared(ROOT / "cluster.yaml")
        ec2 = boto3.client("ec2", config["provider"]["region"])
        image = ec2.describe_images()["Images"][0]["ImageId"]
        for kind in config["available_node_types"].values():
            kind["node_config"]["ImageId"] = image
        written = {name: dict(kind["resources"]) for name, kind in config["available_node_types"].items()}
        config = AWSNodeProvider.bootstrap_config(
            AWSNodeProvider.fillout_available_node_types_resources(config)
        )
        for name, resources in written.items():  # what we write is what AWS says of the instance types
            assert config["available_node_types"][name]["resources"].items() >= resources.items()
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, kind in config["available_node_types"].items():
            provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)
        launched = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        spot = {i["InstanceType"]: i.get("InstanceLifecycle") == "spot" for i in launched}
        assert spot == {"m6i.xlarge": False, "g6.2xlarge": False, "g6.12xlarge": True}
        groups = ec2.describe_security_groups(GroupIds=[launched[0]["SecurityGroups"][0]["GroupId"]])
        open_to_all = [rule for rule in groups["SecurityGroups"][0]["IpPermissions"] if rule["IpRanges"]]
        assert [(rule["FromPort"], rule["ToPort"]) for rule in open_to_all] == [(22, 22)]


# ---- Kubernetes ----


def test_kuberay_knows_every_field() -> None:
    schema = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    for document in kubernetes():
        kind = next(k for k in schema["oneOf"] if k["properties"]["kind"]["const"] == document["kind"])
        errors = list(validator.evolve(schema=kind | {"$defs": schema["$defs"]}).iter_errors(document))
        assert not errors, [f"{error.json_path}: {error.message}" for error in errors]
    wrong = ray_cluster() | {"headGroupSpecs": {}}
    assert list(
        validator.evolve(schema=schema["$defs"]["rayCluster"] | {"$defs": schema["$defs"]}).iter_errors(wrong)
    )


def test_rays_autoscaler_reads_the_roles_from_it() -> None:
    cluster = {"metadata": {"name": "polyref", "namespace": "default"}, "spec": ray_cluster()}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["GPU"] == 0
    assert not {REFERENCE_ROLE, TRAINER_ROLE} & set(types["headgroup"]["resources"])
    assert types["references"]["resources"].items() >= {REFERENCE_ROLE: 1, "GPU": 1}.items()
    assert types["trainers"]["resources"].items() >= {TRAINER_ROLE: 1, "GPU": 4}.items()
    assert all(
        types[name]["min_workers"] == 0 < types[name]["max_workers"] for name in ("references", "trainers")
    )
    (head,) = ray_cluster()["headGroupSpec"]["template"]["spec"]["containers"]
    told = json.loads({entry["name"]: entry.get("value") for entry in head["env"]}[NODE_TYPES])
    assert set(told) == {"references", "trainers"}
    for name, kind in told.items():
        assert kind["max_workers"] == types[name]["max_workers"]
        assert kind["resources"].items() <= types[name]["resources"].items()


def test_its_pods_are_sound() -> None:
    claims = {d["metadata"]["name"] for d in kubernetes() if d["kind"] == "PersistentVolumeClaim"}
    maps = {d["metadata"]["name"] for d in kubernetes() if d["kind"] == "ConfigMap"}
    images = set()
    for group in groups():
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert pod["securityContext"]["runAsNonRoot"]
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] in claims
        assert volumes["run"]["configMap"]["name"] in maps
        for container in pod["containers"]:
            images.add(container["image"])
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "ports" not in container
    assert len(images) == 1
    assert ray_cluster()["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert ray_cluster()["authOptions"] == {"mode": "token"}
    assert ray_cluster()["rayVersion"] == ray.__version__


def test_its_run_file_is_one_and_its_storage_is_shared(tmp_path: Path) -> None:
    [content] = [d["data"]["run.yaml"] for d in kubernetes() if d["kind"] == "ConfigMap"]
    (tmp_path / "run.yaml").write_text(content)
    run = load_run(tmp_path / "run.yaml")
    [job] = [d for d in kubernetes() if d["kind"] == "RayJob"]
    assert job["metadata"]["name"] == f"polyref-{run.name}"
    mounts = {
        m["name"]: m["mountPath"] for m in groups()[0]["template"]["spec"]["containers"][0]["volumeMounts"]
    }
    assert run.storage_path.startswith(mounts["shared"])
    assert job["spec"]["entrypoint"] == f"polyref train {mounts['run']}/run.yaml"


def test_the_image_has_the_whole_project() -> None:
    text = (CLUSTERS / "Dockerfile").read_text()
    copied = {
        source for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for source in line.split()[:-1]
    }
    mounted = {source for source in read(ROOT / "cluster.yaml")["file_mounts"].values() if "~" not in source}
    assert copied == mounted
    assert "--constraint constraints.txt '.[quantization]'" in text
    assert re.search(r"^USER polyref$", text, re.MULTILINE)
