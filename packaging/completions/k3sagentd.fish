# SPDX-License-Identifier: Apache-2.0
complete -c k3sagentd -f
complete -c k3sagentd -n __fish_use_subcommand -a run -d 'run the daemon'
complete -c k3sagentd -n __fish_use_subcommand -a apply -d 'carry out the order that is there'
complete -c k3sagentd -n __fish_use_subcommand -a facts -d 'look at this machine'
complete -c k3sagentd -n __fish_use_subcommand -a provision -d 'take configuration and token'
complete -c k3sagentd -n __fish_use_subcommand -a status -d 'show the site'
complete -c k3sagentd -n __fish_use_subcommand -a wait -d 'wait for the site to come that far'
complete -c k3sagentd -n __fish_use_subcommand -a registration -d 'show where a machine joins'
complete -c k3sagentd -n __fish_use_subcommand -a token -d 'the token of the site'
complete -c k3sagentd -n __fish_use_subcommand -a config -d 'the configuration'
complete -c k3sagentd -n __fish_use_subcommand -a cluster-init -d 'start the cluster here'
complete -c k3sagentd -n __fish_use_subcommand -a leave -d 'take this machine out of its cluster'
complete -c k3sagentd -n __fish_use_subcommand -a repair-addresses -d 'get a server whose address changed back'
complete -c k3sagentd -n __fish_use_subcommand -a reset -d 'make this machine as before its first start'
complete -c k3sagentd -n __fish_use_subcommand -a lab -d 'a site of several machines on this one'
complete -c k3sagentd -n '__fish_seen_subcommand_from status registration' -l json
complete -c k3sagentd -n '__fish_seen_subcommand_from status' -l watch
complete -c k3sagentd -n '__fish_seen_subcommand_from wait' -l for -x -a 'nominated sealed joined complete'
complete -c k3sagentd -n '__fish_seen_subcommand_from wait' -l timeout -x
complete -c k3sagentd -n '__fish_seen_subcommand_from token' -a 'create rotate forget'
complete -c k3sagentd -n '__fish_seen_subcommand_from token' -l next
complete -c k3sagentd -n '__fish_seen_subcommand_from token' -l file -r -F
complete -c k3sagentd -n '__fish_seen_subcommand_from config' -a check
complete -c k3sagentd -n '__fish_seen_subcommand_from cluster-init' -l force
complete -c k3sagentd -n '__fish_seen_subcommand_from cluster-init leave repair-addresses reset' -l yes
complete -c k3sagentd -n '__fish_seen_subcommand_from lab' -a 'up exec add kill start partition heal status down'
