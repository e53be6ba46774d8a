# SPDX-License-Identifier: Apache-2.0
# The one door: each target installs what it needs (Debian 12 or 13, root).

PYTHON  = /usr/bin/python3
NODES   = 5
SECONDS_IDLE = 300
RUNS    = 100000
MINUTES = 10
WORKERS = 3
VENV    = build/venv
RUNTIME = python3 python3-zeroconf python3-ifaddr python3-aiohttp python3-cryptography \
          python3-systemd python3-yaml
LAB     = $(RUNTIME) etcd-server iproute2 nftables util-linux
DEB     = mmdebstrap git
REPO    = $(DEB) reprepro gnupg
FLEET   = $(LAB) $(REPO) python3-pytest python3-pytest-xdist systemd-container
TEST    = $(FLEET) etcd-client faketime avahi-daemon openssl strace keepalived curl
LINT    = $(TEST) python3-venv python3-pip shellcheck
SCRIPTS = $(shell git grep -lE '^.!/bin/(ba)?sh' -- ':!debian/*.postrm')
install = dpkg -s $(1) >/dev/null 2>&1 || { apt-get update -q && \
          DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(1); }

.PHONY: lab test sim planted exhaustive chaos bench lint deb apt-repo fleet docs clean

lab:  ## a site of NODES machines on this one; Ctrl-C takes it down
	@$(call install,$(LAB)) >/dev/null
	@$(PYTHON) -m k3sagentd lab --nodes $(NODES)

test:  ## every test, against Debian's own Python and packages
	@$(call install,$(TEST)) >/dev/null
	@$(PYTHON) -m pytest --numprocesses=$(WORKERS) --dist=loadgroup

sim:  ## RUNS simulated sites on all cores (or for SECONDS, or the one of SEED with its timeline)
	@$(call install,$(RUNTIME)) >/dev/null
	@$(PYTHON) -m tests.sim --runs $(RUNS) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

planted:  ## faults put into the product on purpose: the simulator must catch each
	@$(call install,$(RUNTIME)) >/dev/null
	@$(PYTHON) -m tests.sim.planted

exhaustive:  ## every run of three acceptors and two proposers, within a bound
	@$(call install,$(RUNTIME)) >/dev/null
	@$(PYTHON) -m tests.sim.exhaustive

chaos:  ## MINUTES of cut wires, power cuts and kills over real daemons
	@$(call install,$(TEST)) >/dev/null
	@$(PYTHON) -m tests.lab.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

bench:  ## figures beside their references, in build/bench.json
	@$(call install,$(TEST)) >/dev/null
	@$(PYTHON) -m tests.bench.run --idle-seconds $(SECONDS_IDLE)

lint: $(VENV)/.done  ## ruff, mypy --strict, shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	shellcheck $(SCRIPTS)

$(VENV)/.done: Makefile
	@$(call install,$(LINT)) >/dev/null
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check 'ruff>=0.8' 'mypy>=1.13' types-PyYAML
	@touch $@

deb:  ## the packages, in build/deb; built twice and compared, and checked by lintian
	@$(call install,$(DEB)) >/dev/null
	@packaging/build/deb --check

apt-repo:  ## a signed APT repository of them, in build/apt-repo
	@$(call install,$(REPO)) >/dev/null
	@packaging/build/deb
	@packaging/build/apt-repo

fleet:  ## booted Debian machines: all of one release, of the other, and a mix; FLEET_SEED=…
	@$(call install,$(FLEET)) >/dev/null
	@for releases in bookworm trixie bookworm,trixie; do \
	    FLEET_RELEASES=$$releases $(PYTHON) -m pytest -s tests/fleet || exit 1; done

docs:  ## the pages that are made from the code
	$(PYTHON) -m tests.lifecycle_doc > docs/lifecycle.md

clean:
	rm -rf build
