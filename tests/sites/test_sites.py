"""What a machine is: descriptions that are complete, sourced, and refused with the entry that is wrong."""

import os
import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nurion_utils import sites
from nurion_utils.sites.__main__ import main

NURION = (sites.DIRECTORY / "nurion.toml").read_text()


def refusal(directory, text):
    """The error that reading ``text`` as a site's file gives, without the file that it names."""
    path = directory / "mine.toml"
    path.write_text(text)
    with pytest.raises(sites.SiteError) as caught:
        sites.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_rpeak_follows_from_the_figures_within_half_a_per_cent():
    nurion = sites.load("nurion")
    assert nurion.rpeak_pflops == pytest.approx(nurion.performance.rpeak_quoted_pflops, rel=5e-3)
    assert nurion.rpeak_pflops == pytest.approx(25.7, rel=5e-3)


def test_figures_are_plain_numbers_and_their_provenance_is_one_step_away():
    nurion = sites.load("nurion")
    assert nurion.node.memory_usable_gb == 82
    assert nurion.partitions["skylake"].cores == 40
    assert nurion.file_systems["scratch"].bandwidth_gb_per_s == 300
    figure = nurion.fabric.figures["link_gb_per_s"]
    assert (figure.value, figure.status) == (nurion.fabric.link_gb_per_s, "remembered")


def test_the_tree_of_the_fabric_is_consistent():
    nurion = sites.load("nurion")
    fabric = nurion.fabric
    assert fabric.edge_down + fabric.edge_up == fabric.edge_ports
    assert fabric.edge_up / fabric.edge_down == 1 - fabric.blocking_percent / 100
    nodes = sum(node.count for node in nurion.partitions.values())
    assert fabric.edge_switches * fabric.edge_down >= nodes
    assert fabric.directors * fabric.director_ports >= fabric.edge_switches * fabric.edge_up


def test_a_network_that_is_not_a_fat_tree_needs_no_figures_of_one(tmp_path):
    lines = [line for line in NURION.splitlines() if not re.match(r"edge_|director|blocking_|switch_lat", line)]
    text = "\n".join(lines).replace('"fat tree"', '"dragonfly"').replace('"Omni-Path"', '"Aries"')
    (tmp_path / "mine.toml").write_text(text)
    fabric = sites.read(tmp_path / "mine.toml").fabric
    assert (fabric.name, fabric.topology, fabric.latency_us) == ("Aries", "dragonfly", 2.5)
    assert fabric.edge_down is None and "edge_down" not in fabric.figures


@pytest.mark.parametrize("name", sites.names())
def test_every_figure_names_its_source(name):
    table = sites.load(name).table()
    assert list(table.columns) == ["figure", "value", "unit", "status", "source", "date"]
    assert (table["source"].str.len() > 0).all()
    assert set(table["status"]) <= {"read", "remembered", "derived", "measured", "chosen"}


def test_a_source_given_by_its_short_name_is_spelt_out():
    nurion = sites.load("nurion")
    short = {figure.source for _, part in nurion.parts() for figure in part.figures.values()}
    assert {"paper", "guide"} <= short & set(nurion.sources)


def test_the_local_machine_is_measured_when_it_is_loaded():
    node = sites.load("local").node
    assert node.figures["cores"].status == "measured"
    assert 1 <= node.cores <= len(os.sched_getaffinity(0))
    assert 0 < node.memory_usable_gb <= node.memory_gb
    assert sites.load("local").ranks.max_ranks >= 4


def test_a_measured_figure_follows_the_cores_a_process_is_given():
    code = "from nurion_utils import sites; print(sites.load('local').node.cores)"
    pinned = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {code}"
    result = subprocess.run([sys.executable, "-c", pinned], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"


def test_an_unknown_site_is_refused_with_those_that_exist():
    with pytest.raises(sites.SiteError, match=r"no site 'fugaku'.*local, neuron, nurion"):
        sites.load("fugaku")


def test_the_peak_of_a_node_without_a_clock_is_not_invented():
    with pytest.raises(sites.SiteError, match="clock_ghz"):
        _ = sites.load("local").rpeak_pflops


def test_figures_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        sites.load("nurion").node.cores = 1


def entries():
    """Number, section and text of each line with a figure."""
    section = ""
    for number, line in enumerate(NURION.splitlines()):
        if header := re.match(r"\[(.+)\]", line):
            section = header[1].replace('"', "")
        elif re.match(r"\w+ += \{ value", line):
            yield number, section, line


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    entry=st.sampled_from(list(entries())),
    mutation=st.sampled_from(["no source", "unknown status", "wrong type", "bare value", "misspelt key"]),
)
def test_a_wrong_entry_is_refused_naming_its_section_and_key(tmp_path, entry, mutation):
    number, section, line = entry
    key = line.split()[0]
    changed = {
        "no source": re.sub(r", source = .*", " }", line),
        "unknown status": re.sub(r'status = "\w+"', 'status = "guessed"', line),
        "wrong type": re.sub(r"value = .*, status", "value = true, status", line),
        "bare value": f"{key} = 7",
        "misspelt key": f"x{line}",
    }[mutation]
    lines = NURION.splitlines()
    lines[number] = changed
    prefix = "x" if mutation == "misspelt key" else ""
    assert refusal(tmp_path, "\n".join(lines)).startswith(f"{section}.{prefix}{key}")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("value = 68,", "value = -3,", "greater than 0, not -3"),
        ('status = "derived", source = "48', 'status = "invented", source = "48', "'read', 'remembered'"),
        ("[fabric]", "[fabrik]", "the known ones are: .*fabric"),
        ("edge_up ", "edge_upp ", "edge_upp: no such entry is known here; .*edge_up,"),
        ("\ntopology ", "\n# topology ", "topology: this entry is missing"),
        ("[partitions.knl]", "[partition.knl]", "^partition: no such entry"),
        ("clock_ghz             = {", "clock_ghz             = ", "this is not TOML"),
    ],
)
def test_a_refusal_says_what_would_be_right(tmp_path, old, new, says):
    assert old in NURION
    message = refusal(tmp_path, NURION.replace(old, new, 1))
    assert re.search(says, message)
    assert "\n" not in message


def test_the_command_shows_a_site_or_says_which_there_are(capsys):
    assert main(["show", "nurion"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"memory_usable_gb +82\.0 +GB +read +guide \(cache mode\)", shown)
    assert main(["list"]) == 2
    assert (
        "sites show NAME, with NAME one of cori, elcapitan, hangang, local, neuron, nurion, pbs"
        in capsys.readouterr().err
    )
    assert main(["show", "nowhere"]) == 2
    assert "neuron, nurion" in capsys.readouterr().err


def test_importing_the_package_loads_no_pydantic():
    code = "import sys, nurion_utils; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_file_of_the_users_own_wins_over_a_shipped_one_and_needs_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    shipped = sites.names()
    (tmp_path / "nurion/sites").mkdir(parents=True)
    (tmp_path / "nurion/sites/mine.toml").write_text('title = "My cluster"\n')
    (tmp_path / "nurion/sites/nurion.toml").write_text(NURION.replace("value = 8305", "value = 12"))
    assert sites.load("mine").title == "My cluster" and sites.names() == sorted([*shipped, "mine"])
    assert sites.load("nurion").node.count == 12 and sites.read(sites.DIRECTORY / "nurion.toml").node.count == 8305
    (tmp_path / "nurion/sites/nurion.toml").write_text("title = 1")
    with pytest.raises(sites.SiteError, match=f"^{tmp_path}/nurion/sites/nurion.toml: title: "):
        sites.load("nurion")


def test_without_a_place_of_its_own_configuration_lies_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".config/nurion/sites").mkdir(parents=True)
    (tmp_path / ".config/nurion/sites/mine.toml").write_text('title = "My cluster"\n')
    assert "mine" in sites.names()


def test_a_machine_of_which_little_is_known_is_not_given_figures():
    with pytest.raises(sites.SiteError, match="'slurm' does not say what its nodes are: add \\[partitions.NAME\\]"):
        _ = sites.load("slurm").node
    for name in ("slurm", "hangang"):
        with pytest.raises(sites.SiteError, match="does not say how many nodes it has"):
            _ = sites.load(name).rpeak_pflops


@pytest.mark.parametrize("name", sites.names())
def test_every_rule_says_of_when_it_is(name):
    site = sites.load(name)
    rules = [figure for part in (*site.queues.values(), *site.options.values()) for figure in part.figures.values()]
    assert all(re.fullmatch(r"20\d\d(-\d\d)?", figure.date) and figure.cited.endswith(figure.date) for figure in rules)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (', date = "2026-03" }\nmost_nodes', " }\nmost_nodes", "queues.normal.most_hours.date: this entry is missing"),
        ("[queues.debug]", "[queues.debugg]", "queues.debugg: name it in scheduler.queues"),
        ('value = "skylake"', 'value = "skl"', "queues.norm_skl: name it in .* a partition that is described"),
        ('needed = { value = "always"', 'needed = { value = "ever"', "options.-A.needed: .*'always'"),
        ('date = "2026-03"', 'date = "March"', "date: "),
    ],
)
def test_a_wrong_rule_is_refused(tmp_path, old, new, says):
    assert old in NURION
    assert re.search(says, refusal(tmp_path, NURION.replace(old, new, 1)))
