"""Tiny vision models that have learned nothing, and how the features of each are found by hand."""

import torch
import transformers

from ddpm_vlb.quality.features import quiet

SIZE = 8
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def feature_models():
    """Tiny models by name, with random weights, and how each one's features are found by hand."""
    vit = {**TINY, "image_size": 8, "patch_size": 4}
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vit, projection_dim=12)
    dino = {name: value for name, value in vit.items() if name != "intermediate_size"}
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}

    def cls(model, pixels):
        return getattr(model, "vit", model)(pixels).last_hidden_state[:, 0]

    def pooled(model, pixels):
        return model(pixels).pooler_output.flatten(1)

    def embeds(model, pixels):
        vision = model.vision_model(pixels) if hasattr(model, "vision_model") else model(pixels)
        embedded = vision.image_embeds if "image_embeds" in vision else model.visual_projection(vision.pooler_output)
        return embedded / embedded.norm(dim=1, keepdim=True)

    return {
        "dinov2": (transformers.Dinov2Model(transformers.Dinov2Config(**dino, mlp_ratio=1)), cls),
        "vit": (transformers.ViTModel(transformers.ViTConfig(**vit)), pooled),
        "classifier": (transformers.ViTForImageClassification(transformers.ViTConfig(**vit)), cls),
        "grey": (transformers.ViTModel(transformers.ViTConfig(**vit, num_channels=1)), pooled),
        "resnet": (transformers.ResNetModel(transformers.ResNetConfig(**resnet)), pooled),
        "clip": (transformers.CLIPModel(clip), embeds),
        "clip vision": (transformers.CLIPVisionModel(clip.vision_config), pooled),
        "clip projected": (transformers.CLIPVisionModelWithProjection(clip.vision_config), embeds),
    }


def save_feature_models(home):
    """Saved feature models: their folders, and (model, features by hand)."""
    torch.manual_seed(0)
    models, folders = feature_models(), {}
    for name, (model, _) in models.items():
        folders[name] = home / name
        channels = 1 if name == "grey" else 3
        with quiet():
            model.eval().requires_grad_(False).save_pretrained(folders[name])
            size = {"height": SIZE, "width": SIZE}
            processor = transformers.ViTImageProcessor(
                size=size, image_mean=[0.4] * channels, image_std=[0.2] * channels
            )
            processor.save_pretrained(folders[name])
    return folders, models
