"""What of a run may be uploaded: nothing that names this machine's folders."""

from ddpm_vlb.runtime.staging import without_folders


def test_paths_are_cut(tmp_path, monkeypatch):
    """Absolute and existing local paths lose their folders; names, numbers and Hub names stay as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "pictures").mkdir(parents=True)
    content = {
        "output_dir": str(tmp_path / "run"),
        "train_data_dir": "my/pictures",
        "config": "../secret/options.yaml",
        "cache_dir": "~/cache",
        "dataset_name": "ylecun/mnist",
        "widths": [8, 16],
        "none": None,
        "empty": "",
        "list": [str(tmp_path), 1.5],
        "windows": "C:\\Users\\me\\pictures",
        "url": "file:///data/pictures",
        "gone": "runs/secret/digits",
        "nobody": "~nobody-here/x",
        "long": "x" * 5000,
        "text": "1.79 of 17 levels",
    }
    assert without_folders(content) == {
        "output_dir": "./run",
        "train_data_dir": "./pictures",
        "config": "./options.yaml",
        "cache_dir": "./cache",
        "dataset_name": "ylecun/mnist",
        "widths": [8, 16],
        "none": None,
        "empty": "",
        "list": [f"./{tmp_path.name}", 1.5],
        "windows": "./pictures",
        "url": "./pictures",
        "gone": "./digits",
        "nobody": "./x",
        "long": "x" * 5000,
        "text": "1.79 of 17 levels",
    }
