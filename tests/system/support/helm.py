"""The chart of deploy/helm, as Helm's own library renders it. Without that library, the tests that need it are skipped."""

import functools

import pytest
import yaml

from .processes import ROOT

DIRECTORY = ROOT / "deploy/helm"
CHART = DIRECTORY / "flower-exporter"
#: A release whose objects have the names of the kustomize base.
RELEASE = "flower-exporter"

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed: the chart is not tested")


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that occurs twice, like kubectl."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"duplicate key: {keys}"
        return super().construct_mapping(node, deep)


@functools.cache
def chart():
    return helm.Chart.load(CHART)


def texts(values=None, name=RELEASE):
    """{file below templates/: text} of a release in the namespace celery."""
    rendered = chart().render(values=values or {}, name=name, namespace="celery")
    return {path.partition("/templates/")[2]: text for path, text in rendered.items()}


def render(values=None, name=RELEASE):
    """The manifests of a release."""
    files = [text for path, text in texts(values, name).items() if path.endswith(".yaml")]
    return [document for text in files for document in yaml.load_all(text, StrictLoader) if document]  # noqa: S506


def refusal(values):
    """Helm's error for values that the chart refuses."""
    with pytest.raises(helm.HelmError) as error:
        render(values)
    return str(error.value)
