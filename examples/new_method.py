"""(IA)3 (https://arxiv.org/abs/2205.05638) as a method of your own: trained factors of keys, values and activations."""

import torch
from transformers import ViTConfig, ViTModel

import memtune


class IA3Config(memtune.AdapterConfig):
    method = "ia3"


@memtune.register_method
class IA3Adapter(memtune.Adapter[IA3Config]):
    config_class = IA3Config

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.blocks = torch.nn.ModuleDict()
        for block in config.select(backbone):
            sizes = {"key": block.width, "value": block.width, "fc2": block["fc2"].in_features}
            self.blocks[str(block.index)] = torch.nn.ParameterDict({role: torch.ones(n) for role, n in sizes.items()})

    @classmethod
    def attach(cls, stream, adapters):
        """A factor of the keys acts as well on the query, one of the values on the context; so both modes are alike."""
        for block, stack in stream.stacks(adapters):
            key, value, fc2 = (stack.tensor(name, neutral=1.0) for name in ("key", "value", "fc2"))
            block["query"].register_forward_hook(lambda _, args, out, key=key: out * key.like(out))
            block["out"].register_forward_pre_hook(lambda _, args, value=value: args[0] * value.like(args[0]))
            block["fc2"].register_forward_pre_hook(lambda _, args, fc2=fc2: args[0] * fc2.like(args[0]))


if __name__ == "__main__":
    vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).eval()
    model = memtune.wrap(vit, IA3Config(), labels=["cat", "dog"], masked=True)
    images = [{"pixel_values": torch.randn(3, 224, 224), "labels": index % 2} for index in range(8)]
    print(memtune.fit(model, images, config=memtune.TrainingConfig(max_steps=2, warmup_ratio=0)).history)
    model.save_pretrained("ia3-adapter")
    print(memtune.load("ia3-adapter", backbone=vit).trainable_parameters())
