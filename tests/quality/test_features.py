"""Features of images: those of the vision model itself, whatever its kind."""

import numpy as np
import PIL.Image
import pytest
import torch
from vision_models import SIZE, save_feature_models

from ddpm_vlb.quality.features import FeatureModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def viewers(tmp_path_factory):
    """Saved feature models: their folders, and (model, features by hand)."""
    return save_feature_models(tmp_path_factory.mktemp("viewers"))


def some_images(channels, count=6):
    return torch.randint(256, (count, channels, SIZE, SIZE), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["dinov2", "vit", "classifier", "resnet", "clip", "clip vision", "clip projected"])
def test_features_of_any_vision_model(viewers, name, channels):
    """Those of the model itself on normalised pixels; grey images are repeated to three channels."""
    folders, models = viewers
    images = some_images(channels)
    features = FeatureModel(str(folders[name]), CPU)
    model, by_hand = models[name]
    expected = by_hand(model, ((images.float() / 255 - 0.4) / 0.2).expand(-1, 3, -1, -1))
    torch.testing.assert_close(features(images), expected.double(), rtol=1e-5, atol=1e-5)
    assert features(images).std(0).max() > 1e-4 and features.sigma == (
        10.0 if name in ("clip", "clip projected") else None
    )


def test_a_feature_model_of_grey_images(viewers):
    """Takes them as they are, and no others."""
    folders, models = viewers
    features = FeatureModel(str(folders["grey"]), CPU)
    expected = models["grey"][0]((some_images(1).float() / 255 - 0.4) / 0.2).pooler_output
    torch.testing.assert_close(features(some_images(1)), expected.double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="grey.*colour"):
        features(some_images(3))


@pytest.mark.parametrize("name", ["grey", "dinov2"])
def test_grey_images_are_resized_too(viewers, name):
    """As one that is twice the model's size shows: the features are those of its half."""
    images = some_images(1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    half = [PIL.Image.fromarray(image[0].numpy()).resize((SIZE, SIZE), 2) for image in images]
    features = FeatureModel(str(viewers[0][name]), CPU)
    small = torch.from_numpy(np.stack([np.asarray(picture) for picture in half]))[:, None]
    torch.testing.assert_close(features(images), features(small), rtol=1e-5, atol=1e-5)


def test_images_are_resized_as_the_processor_says(viewers):
    """As PIL does it, here to the model's size from twice that."""
    folders, models = viewers
    images = torch.randint(256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    pictures = [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).resize((SIZE, SIZE), 2) for image in images]
    small = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    features = FeatureModel(str(folders["dinov2"]), CPU)
    torch.testing.assert_close(features(images), features(small), rtol=1e-5, atol=1e-5)
