"""What pyproject.toml cannot say: the repository's configs/ is moco_dist/configs in a wheel."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["moco_dist*"], exclude=["*.examples"]), "moco_dist.configs"],
    package_dir={"moco_dist.configs": "configs"},
)
