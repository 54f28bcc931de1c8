"""Models that others wrote, small and with random weights: what their users would give as `model.class_path`.

`DATA` names them all: the shapes of a sample's input and target, and the loss.
"""

import sys
import types

import torch
from torch import nn

# PyPI's torchvision asks for operators that a CPU build of torch has not
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

IMAGE, VOLUME, BYTES = (3, 32, 32), (1, 16, 16, 16), (12,)
CLASSES, VOCABULARY = 10, 32


class Logits(nn.Module):
    """A language model whose output is its logits: (n, length) numbers to (n, vocabulary, length)."""

    def __init__(self, model, both=False, use_cache=False):
        super().__init__()
        self.model, self.both, self.use_cache = model, both, use_cache

    def forward(self, x):
        more = {"decoder_input_ids": x} if self.both else {}
        return self.model(input_ids=x, use_cache=self.use_cache, **more).logits.transpose(1, 2)


def resnet():
    """Batch normalisation and skips."""
    from torchvision.models import resnet18

    return resnet18(num_classes=CLASSES)


def gpt2():
    """One matrix is embedding and head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=4, n_head=2)
    return Logits(GPT2LMHeadModel(config))


def llama():
    """Grouped keys, rotary positions; a mask only where it is exported, which rounds otherwise.

    Without a cache it makes one for tensors without numbers, too, which nobody can answer otherwise.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return Logits(LlamaForCausalLM(config), use_cache=True)


def t5():
    """Encoder and decoder, one embedding under four names; symbolic_trace can't follow its forward."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return Logits(T5ForConditionalGeneration(config), both=True)


def convnext():
    """Depthwise convolutions, layer scale, stochastic depth."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.3, num_classes=CLASSES)


def vit():
    """A class token and positions that are learnt."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=8, num_classes=CLASSES, embed_dim=48, depth=4, num_heads=3, drop_rate=0.1
    )


def unet():
    """Skips over many layers, concatenated."""
    from segmentation_models_pytorch import Unet

    return Unet("resnet18", encoder_weights=None, in_channels=3, classes=3)


def unet3d():
    """Three dimensions, residual units."""
    from monai.networks.nets import UNet

    return UNet(3, 1, 1, channels=(4, 8, 16), strides=(2, 2), num_res_units=1)


def fno():
    """Complex weights between Fourier transforms."""
    from neuralop.models import FNO

    return FNO(n_modes=(8, 8), in_channels=3, out_channels=3, hidden_channels=8, n_layers=4)


CROSS, SQUARE = "torch.nn.CrossEntropyLoss", "torch.nn.MSELoss"
DATA = {
    "resnet": (IMAGE, (), CROSS),
    "gpt2": (BYTES, BYTES, CROSS),
    "t5": (BYTES, BYTES, CROSS),
    "llama": (BYTES, BYTES, CROSS),
    "convnext": (IMAGE, (), CROSS),
    "vit": (IMAGE, (), CROSS),
    "unet": (IMAGE, IMAGE, SQUARE),
    "unet3d": (VOLUME, VOLUME, SQUARE),
    "fno": (IMAGE, IMAGE, SQUARE),
}


def tensors(name, count=12):
    """Made-up samples: floats for images, numbers of the vocabulary or of classes else."""
    generator = torch.Generator().manual_seed(4)

    def of(shape):
        if shape in (IMAGE, VOLUME):
            return torch.randn(count, *shape, generator=generator).numpy()
        return torch.randint(CLASSES, (count, *shape), generator=generator).numpy()

    x, y, _ = DATA[name]
    return of(x), of(y)
