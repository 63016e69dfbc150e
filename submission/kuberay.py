"""A job on Kubernetes: the manifest of a RayJob, for which KubeRay makes a cluster, runs train.py and removes the cluster.

The head's pod is the first node of the layout, a group of workers the others: all of them, or with an elastic fleet those
of the fewest actors and what is asked for, by Ray's autoscaler. Not run on Kubernetes yet.
"""

from importlib.metadata import version
from typing import Any

import yaml

from contracts.checks.cluster_checks import stated_nodes
from contracts.config import ClusterConfig, TandemConfig
from contracts.placement import is_elastic, nodes_for, plan
from submission.job import Job
from submission.targets import KubeRay

GRACE_S = 30  # that a pod gets beyond the job's own time to stop


def render(job: Job, config: TandemConfig) -> str:
    """The manifest as YAML.

    Args:
        config: with cluster.num_nodes, gpus_per_node and cpus_per_node set.
    """
    return yaml.safe_dump(manifest(job, config), sort_keys=False, width=120)


def manifest(job: Job, config: TandemConfig) -> dict[str, Any]:
    """A ray.io/v1 RayJob."""
    target, cluster = job.target, config.cluster
    assert isinstance(target, KubeRay)
    assert cluster.num_nodes is not None
    grows = is_elastic(cluster) or config.reward_service.max_replicas is not None
    least = nodes_for(plan(config), stated_nodes(config) or []) if grows else cluster.num_nodes
    start = {"num-cpus": f"{cluster.cpus_per_node:g}", "num-gpus": f"{cluster.gpus_per_node:g}"}
    template = pod(job.id, target, cluster, head=True)
    head = {"rayStartParams": {**start, "dashboard-host": "0.0.0.0"}, "template": template}
    workers = {
        "groupName": "workers",
        "replicas": least - 1,  # KubeRay starts the job when all of these are there
        "minReplicas": least - 1,
        "maxReplicas": cluster.num_nodes - 1,
        "rayStartParams": start,
        "template": pod(job.id, target, cluster, head=False),
    }
    # The pods have target.env. KubeRay writes this section into a line of a shell, in double quotes, in which that would
    # expand a `$`; so it writes `metadata`, which is left out.
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(target.stop_wait_s)}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job.id, "namespace": target.namespace, "labels": {"app.kubernetes.io/name": "tandem"}},
        "spec": {
            "entrypoint": job.command,
            "jobId": job.id,
            "runtimeEnvYAML": yaml.safe_dump({"working_dir": target.directory, "env_vars": environment}, width=1000),
            "backoffLimit": target.retries,
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},  # KubeRay (1.5.1 or newer) makes one and gives it to every pod
                "enableInTreeAutoscaling": grows,
                "headGroupSpec": head,
                "workerGroupSpecs": [workers] if cluster.num_nodes > 1 else [],
            },
        },
    }


def pod(job_id: str, target: KubeRay, cluster: ClusterConfig, head: bool) -> dict[str, Any]:
    """A pod that is one node of the layout: requests are limits, so that nobody else's load counts against it."""
    resources: dict[str, Any] = {"cpu": f"{cluster.cpus_per_node:g}", "memory": f"{target.memory_gib}Gi"}
    if cluster.gpus_per_node:
        resources["nvidia.com/gpu"] = f"{cluster.gpus_per_node:g}"
    container: dict[str, Any] = {
        "name": "ray-head" if head else "ray-worker",
        "image": target.image,
        "workingDir": target.directory,
        "env": [{"name": name, "value": value} for name, value in target.env.items()],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    spec: dict[str, Any] = {
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{target.shared_memory_gib}Gi"}}],
        "terminationGracePeriodSeconds": target.stop_wait_s + GRACE_S,
    }
    # A pod that must go signals its first process alone. The head's stops the job, which sends train.py a SIGTERM, and waits
    # for its checkpoint; another's rollout actors finish what they hold.
    job_stops = ["ray", "job", "stop", "--address", "http://127.0.0.1:8265", job_id]
    actors_leave = [target.python, "-m", "actors.leave", "--within", str(target.stop_wait_s)]
    container["lifecycle"] = {"preStop": {"exec": {"command": job_stops if head else actors_leave}}}
    if target.volume_claim is not None:
        container["volumeMounts"].append({"name": "shared", "mountPath": target.volume_path})
        spec["volumes"].append({"name": "shared", "persistentVolumeClaim": {"claimName": target.volume_claim}})
    return {"spec": spec}


def commands(job: Job, file: str) -> dict[str, list[str]]:
    """What each verb runs; `file` holds the manifest."""
    target = job.target
    assert isinstance(target, KubeRay)
    kubectl = ["kubectl", f"--namespace={target.namespace}"]
    return {
        "submit": [*kubectl, "create", f"--filename={file}"],
        "status": [*kubectl, "get", "rayjob", job.id],
        "logs": [*kubectl, "logs", "--follow", f"--selector=job-name={job.id}", "--tail=-1"],
        "stop": [*kubectl, "delete", "rayjob", job.id],
        "resume": [*kubectl, "replace", "--force", f"--filename={file}"],
    }
