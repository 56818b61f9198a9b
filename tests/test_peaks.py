"""The table of peaks. The numbers here are written out from the data sheets, not taken from the table."""

import pytest

from sdnb.machine import peaks


@pytest.mark.parametrize(
    "name, precision, peak",
    [
        ("NVIDIA A100-SXM4-80GB", "fp16", 312),
        ("NVIDIA A100-SXM4-80GB", "no", 156),
        ("NVIDIA A100-PCIE-40GB", "bf16", 312),
        ("NVIDIA A800 80GB PCIe", "fp16", 312),
        ("NVIDIA A10", "fp16", 125),
        ("NVIDIA A10G", "fp16", 70),
        ("NVIDIA A30", "fp16", 165),
        ("NVIDIA A40", "bf16", 149.7),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 80GB HBM2e", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H200", "fp16", 1979 / 2),
        ("NVIDIA H20", "fp16", 148),
        ("NVIDIA H20-3e", "fp16", 148),
        ("NVIDIA H800", "bf16", 989),
        ("NVIDIA H800 PCIe", "bf16", 1513 / 2),
        ("NVIDIA GH200 480GB", "bf16", 1979 / 2),
        ("NVIDIA B200", "fp16", 36_000 / 8 / 2),
        ("NVIDIA B200", "no", 18_000 / 8 / 2),
        ("NVIDIA B300 SXM6 AC", "bf16", 36_000 / 8 / 2),
        ("NVIDIA GB200", "bf16", 360_000 / 72 / 2),
        ("NVIDIA GB300", "bf16", 360_000 / 72 / 2),
        ("NVIDIA L4", "fp16", 242 / 2),
        ("NVIDIA L20", "fp16", 119.5),
        ("NVIDIA L40", "fp16", 362.1 / 2),
        ("NVIDIA L40S", "fp16", 362),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla T4", "no", 8.1),
        ("NVIDIA GeForce RTX 3090", "fp16", 142.4 / 2),
        ("NVIDIA GeForce RTX 4090", "fp16", 330.4 / 2),
        ("NVIDIA GeForce RTX 5090", "fp16", 419 / 2),
        ("NVIDIA RTX A6000", "fp16", 309.6 / 2),
        ("NVIDIA RTX 6000 Ada Generation", "fp16", 364),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "bf16", 1007.6 / 2),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "bf16", 438.9),
        ("AMD Instinct MI250X", "fp16", 383 / 2),
        ("AMD Instinct MI300A", "fp16", 980.6),
        ("AMD Instinct MI300X", "fp16", 1307.4),
        ("AMD Instinct MI300X", "no", 163.4),
        ("AMD Instinct MI325X", "bf16", 1307.4),
        ("AMD Instinct MI355X", "bf16", 2500),
        ("Intel(R) Data Center GPU Max 1550", "bf16", 839 / 2),
        ("GAUDI2", "bf16", 432),
        ("HL-225", "bf16", 432),
        ("GAUDI3", "bf16", 1835),
        ("MLU370-X8", "fp16", 96),
        ("MTT S4000", "fp16", 100),
        ("Iluvatar BI-V100", "fp16", 147),
    ],
)
def test_devices_get_the_peak_of_their_data_sheet(name, precision, peak):
    assert peaks.peak_tflops(name, precision) == pytest.approx(peak, rel=1e-3) and peaks.source_of_peak(name)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",  # how many multiprocessors a "g" has differs from GPU to GPU
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A100X",
        "NVIDIA A100-SXM-64GB",
        "Tesla V100-FHHL-16GB",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 5090 D v2",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA GB10",
        "AMD Instinct MI250X/MI250",
        "AMD Instinct MI308X",
        "Intel(R) Data Center GPU Max 1100",
        "Ascend910B",
        "Ascend910B3",
        "MLU590-M9",
        "Iluvatar BI-V150",
        "AMD EPYC",
        "",
    ],
)
def test_a_device_does_not_get_the_peak_of_another(name):
    for precision in ("fp16", "bf16", "no"):
        assert peaks.peak_tflops(name, precision) is None
    assert peaks.source_of_peak(name) is None


def test_a_precision_without_a_rate_has_no_peak():
    assert peaks.peak_tflops("Tesla T4", "bf16") is None and peaks.peak_tflops("NVIDIA H20", "no") is None


@pytest.mark.parametrize("name, entry", peaks._TABLE["peaks"].items())
def test_every_entry_of_the_table_has_rates_and_a_source(name, entry):
    rates = {precision: rate for precision, rate in entry.items() if precision != "source"}
    assert rates and rates.keys() <= {"fp16", "bf16", "tf32", "no"} and all(rate > 0 for rate in rates.values())
    assert peaks._TABLE["sources"][entry["source"]].startswith("https://")
    assert peaks.source_of_peak(f"made by a vendor, {name} 80GB") == entry["source"], "it can be found by its name"


def test_every_source_is_one_of_an_entry():
    assert peaks._TABLE["sources"].keys() == {entry["source"] for entry in peaks._TABLE["peaks"].values()}


@pytest.mark.parametrize("name", peaks._TABLE["unknown"])
def test_what_is_unknown_would_else_have_the_peak_of_another(name, monkeypatch):
    real = {"MIG": "NVIDIA A100-SXM4-80GB MIG 1g.10gb"}.get(name, name)
    assert peaks.peak_tflops(real, "fp16") is None
    monkeypatch.setitem(peaks._TABLE, "unknown", [])
    assert peaks.peak_tflops(real, "fp16")
