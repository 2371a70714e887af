"""Published weights for a backbone: either all tensors are loaded, or an error says why none are.

Half-loaded weights ruin a reproduction without any message, so a missing or unexpected tensor is
always an error. Only the classifier, the final norm and precomputed tables are left out on purpose.
Swin weights come in three layouts: torchvision's, timm's, and Microsoft's official one, which
swin.py follows. Tensors in the first two layouts are renamed.

    load_weights(backbone, "imagenet", "tiny")      # Microsoft's file, downloaded once
    load_weights(backbone, "torchvision", "tiny")   # torchvision's file, downloaded once
    load_weights(backbone, "my_weights.pth")        # a file in any of the three layouts

References: https://github.com/microsoft/Swin-Transformer;
https://github.com/huggingface/pytorch-image-models (timm).
"""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_weight

# Microsoft's and torchvision's weights were trained on ImageNet-1k, at 224x224 pixels.
OFFICIAL_URL = ("https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
                "swin_{name}_patch4_window7_224.pth")
TORCHVISION_NAME = {"tiny": "Swin_T_Weights", "small": "Swin_S_Weights", "base": "Swin_B_Weights"}

DOWNLOADS = ("imagenet", "torchvision")    # the sources that are not files
ASSETS = Path(__file__).parent / "assets"


def load_weights(backbone: nn.Module, source: str, name: str = "tiny") -> None:
    """Load published weights into a Swin Transformer, completely or not at all.

    source: "imagenet" (Microsoft's file), "torchvision" (IMAGENET1K_V1), or the path of a file in
    the official, torchvision or timm layout; for a file in assets/, its name is enough. name: the
    preset whose weights are downloaded. Raises ValueError if the weights cannot be downloaded or
    read, or do not fit the backbone.
    """
    if source in DOWNLOADS:
        if name not in TORCHVISION_NAME:
            raise ValueError(f"--weights {source} exists only for the backbones "
                             f"{', '.join(TORCHVISION_NAME)}, not for {name}; choose one of these, "
                             "or set --weights to none or to the path of a file")
        if source == "imagenet":
            url = OFFICIAL_URL.format(name=name)
        else:
            url = get_weight(f"{TORCHVISION_NAME[name]}.IMAGENET1K_V1").url
        path = fetch(url)
    else:
        path = find_file(source)
    state = official_names(read_file(path))
    load_all(backbone, state, path)


def fetch(url: str) -> Path:
    """Download a file into torch's cache, unless it is there already. Returns its path.

    Raises ValueError if the download fails.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # torchvision puts the first digits of the SHA-256 into the file's name: swin_t-704ceda3.pth.
    match = re.search(r"-([0-9a-f]{8})\.", path.name)
    checksum = match[1] if match else None
    try:
        torch.hub.download_url_to_file(url, str(path), checksum)
    except (OSError, RuntimeError) as error:    # no connection, or a wrong checksum
        raise ValueError(f"weights: cannot download {url}: {error}; download it by hand and pass "
                         "its path as --weights PATH, or use random weights with --weights none"
                         ) from error
    return path


def find_file(source: str) -> Path:
    """The path of a file; `source` may be the bare name of a file in assets/.

    Raises ValueError if there is no such file.
    """
    for path in (Path(source), ASSETS / source):
        if path.is_file():
            return path
    raise ValueError(f"weights: no file {source}; expected imagenet, torchvision, or the path of "
                     "a checkpoint (torchvision works only for Swin)")


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a PyTorch checkpoint, by name.

    The tensors may be inside an entry called "model" or "state_dict". Raises ValueError if the file
    cannot be read by torch.load with weights_only=True, or does not hold a dict.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()     # torch.load does not compare the checksums
            if damaged:
                raise ValueError(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"weights: {path} is damaged, or holds more than tensors, as training "
                         "checkpoints with a configuration do. If you trust its source, save the "
                         'entry with the weights, usually "model", to a new file: torch.save('
                         f"torch.load('{path}', weights_only=False)['model'], 'weights.pth')"
                         ) from error
    except Exception as error:  # torch.load documents no exceptions for a damaged file
        raise ValueError(f"weights: {path} is damaged, or is not a PyTorch checkpoint "
                         f"({type(error).__name__}); if it is a broken download, delete it and try "
                         "again") from error
    if not isinstance(content, dict):
        raise ValueError(f"weights: {path} holds a {type(content).__name__}; expected a dict of "
                         "tensors")
    for key in ("model", "state_dict"):
        if key in content:
            content = content[key]
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value
    return tensors


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give Swin weights in torchvision's or timm's layout the official names.

    Drops the classifier, the final norm, and tables that the network computes itself.
    """
    renamed = {}
    merging_first = not any(key.startswith("layers.0.downsample.") for key in state)
    for key, value in state.items():
        if key.startswith(("norm.", "head.")):
            continue
        if key.endswith(("relative_position_index", "attn_mask")):
            continue
        if key.startswith("features."):
            key = from_torchvision(key)
        elif merging_first:
            key = from_timm(key)
        renamed[key] = value
    return renamed


def from_torchvision(key: str) -> str:
    """The official name of a torchvision weight.

    torchvision numbers its modules: 0 is the patch embedding, 1, 3, 5 and 7 are the stages, and 2,
    4 and 6 the patch mergings.
    """
    key = key.replace("features.0.0.", "patch_embed.proj.")
    key = key.replace("features.0.2.", "patch_embed.norm.")
    for stage in range(4):
        key = key.replace(f"features.{2 * stage + 1}.", f"layers.{stage}.blocks.")
        key = key.replace(f"features.{2 * stage + 2}.", f"layers.{stage}.downsample.")
    key = key.replace("mlp.0.", "mlp.fc1.")
    key = key.replace("mlp.3.", "mlp.fc2.")
    return key


def from_timm(key: str) -> str:
    """The official name of a weight from newer versions of timm.

    In those versions, patches are merged at the start of a stage, not at the end of the previous
    one.
    """
    for stage in range(3):
        key = key.replace(f"layers.{stage + 1}.downsample.", f"layers.{stage}.downsample.")
    return key


def load_all(backbone: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load `state` into `backbone` if all names and shapes match, and all values are finite floats.

    Otherwise leaves `backbone` unchanged and raises a ValueError, which says how many tensors are
    wrong in which way, and names up to eight of each. source: the file's name, for messages.
    """
    own = backbone.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen, not_numbers = [], []
    for key in own.keys() & state.keys():
        shape, expected = tuple(state[key].shape), tuple(own[key].shape)
        if shape != expected:
            misshapen.append(f"{key} {shape}, expected {expected}")
        if not (state[key].is_floating_point() and state[key].isfinite().all()):
            not_numbers.append(key)
    problems = []
    for problem, names in (("missing", missing), ("unexpected", unexpected),
                           ("misshapen", misshapen),
                           ("not finite floating-point numbers", not_numbers)):
        if names:
            more = " ..." if len(names) > 8 else ""
            problems.append(f"{len(names)} {problem}: {', '.join(sorted(names)[:8])}{more}")
    if problems:
        advice = "Use weights that were made for the same --backbone"
        for key in unexpected:
            prefix = key.removesuffix(missing[0]) if missing else key
            if prefix not in ("", key):
                advice = f"Remove the prefix {prefix!r} from the names in the file"
        raise ValueError(f"weights {source} do not fit this backbone: {'; '.join(problems)}. "
                         f"{advice}")
    backbone.load_state_dict(state)
    print(f"backbone weights: {len(state)} of {len(own)} tensors loaded from {source}")
