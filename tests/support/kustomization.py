"""`kubectl kustomize FOLDER`, and the same for the few features that infra/kuberay/ uses where there is no kubectl.

Through JSON where YAML is read: an alias is a copy to kubectl, and the same object to PyYAML.
"""

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Object = dict[str, Any]
CLUSTER_WIDE = {"Namespace", "PriorityClass"}


def kustomize(folder: Path) -> list[Object]:
    """The objects that a folder renders to, by kubectl or kustomize where there is one."""
    kubectl = shutil.which("kubectl")
    command = [kubectl, "kustomize"] if kubectl else [shutil.which("kustomize"), "build"]
    if command[0] is None:
        return render(folder)
    done = subprocess.run([*command, folder], capture_output=True, text=True, timeout=60)  # type: ignore[list-item]
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def render(folder: Path, found: list[Object] | None = None) -> list[Object]:
    """resources, components, patches (JSON 6902 and whole deletes), replacements of whole fields, images, namespace."""
    found = found or []
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"resources", "components", "patches", "replacements", "images", "namespace", "apiVersion", "kind"}
    assert set(kustomization) <= known, "teach this renderer"
    for name in kustomization.get("resources", []):
        path = folder / name
        found += render(path) if path.is_dir() else json.loads(json.dumps(list(yaml.safe_load_all(path.read_text()))))
    for name in kustomization.get("components", []):
        found = render(folder / name, found)
    for patch in kustomization.get("patches", []):
        operations = yaml.safe_load((folder / patch["path"]).read_text() if "path" in patch else patch["patch"])
        found = [each for item in found for each in _patched(item, patch["target"], operations)]
    if "namespace" in kustomization:
        _set_namespace(found, kustomization["namespace"])
    for replacement in kustomization.get("replacements", []):
        _replace(found, replacement)
    for image in kustomization.get("images", []):
        _set_image(found, image)
    return found


def _matches(item: Object, wanted: Object) -> bool:
    return item["kind"] == wanted["kind"] and wanted.get("name") in (None, item["metadata"]["name"])


def _patched(item: Object, target: Object, operations: Any) -> list[Object]:
    if not _matches(item, target):
        return [item]
    if isinstance(operations, list):
        return [jsonpatch.apply_patch(item, operations)]
    assert operations["$patch"] == "delete", "teach this renderer"
    return []


def _set_namespace(found: list[Object], namespace: str) -> None:
    for item in found:
        if item["kind"] == "Namespace":
            item["metadata"]["name"] = namespace
        elif item["kind"] not in CLUSTER_WIDE:
            item["metadata"]["namespace"] = namespace


def _replace(found: list[Object], replacement: Object) -> None:
    source = replacement["source"]
    (value,) = (item[source["fieldPath"]] for item in found if _matches(item, source))
    for target in replacement["targets"]:
        for item in found:
            if _matches(item, target["select"]):
                for path in target["fieldPaths"]:
                    parent, name = path.split(".")
                    item[parent][name] = copy.deepcopy(value)


def _set_image(node: Any, image: Object) -> None:
    if isinstance(node, list):
        for each in node:
            _set_image(each, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            name, _, tag = value.partition(":") if key == "image" else ("", "", "")
            if name == image["name"]:
                node[key] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
            else:
                _set_image(value, image)
