# Reads a NoCloud network-config (version 1 or 2, block or flow style, JSON too) as far as a test guest needs it.
# One line per interface: NAME MAC DHCP(0|1) GATEWAY MTU ADDRESS...   with - for what was not said.
function reset() { name = "-"; mac = "-"; dhcp = 0; gateway = "-"; mtu = "-"; addresses = ""; mask = "" }
function flush() {
    if (name != "-" || mac != "-") print name, tolower(mac), dhcp, gateway, mtu, (addresses == "" ? "-" : addresses)
    reset()
}
function value_of(key, value) {
    if (key ~ /^(macaddress|mac_address)$/) mac = value
    else if (key ~ /^(name|set-name)$/) { if (key == "name" || name == "-") name = value }
    else if (key ~ /^(gateway4|gateway|via)$/) gateway = value
    else if (key == "mtu") mtu = value
    else if (key == "dhcp4") dhcp = (value ~ /^(true|yes|on)$/)
    else if (key ~ /^address(es)?$/ && value ~ /^[0-9.]+(\/[0-9.]+)?$/) {
        if (value ~ /\// || key == "address") addresses = addresses (addresses == "" ? "" : " ") value
    }
    else if (key == "netmask") addresses = addresses "/" value
    else if (key == "type") {
        if (value ~ /^dhcp4?$/) dhcp = 1
        else if (value !~ /^(static|dhcp|manual)/) flush()
    }
}
BEGIN {
    reset()
    known = " network version config ethernets renderer match addresses routes nameservers search subnets "
    known = known "dhcp4-overrides dhcp6-overrides routing-policy macaddress mac_address name set-name gateway4 gateway6 "
    known = known "gateway via to mtu dhcp4 dhcp6 type address netmask metric on-link optional driver control accept-ra "
}
{
    sub(/(^|[ \t])#.*$/, "")
    gsub(/["']/, "")
    gsub(/[][{},]/, "\n")
    count = split($0, pieces, "\n")
    for (i = 1; i <= count; i++) {
        piece = pieces[i]
        while (sub(/^[ \t]*-[ \t]+/, "", piece)) {}
        gsub(/^[ \t]+|[ \t\r]+$/, "", piece)
        if (piece == "" || piece == "-") continue
        if (match(piece, /^[A-Za-z][A-Za-z0-9_.-]*:/) && (index(known, " " substr(piece, 1, RLENGTH - 1) " ") || piece ~ /:( |$)/)) {
            key = substr(piece, 1, RLENGTH - 1)
            value = substr(piece, RLENGTH + 1)
            gsub(/^[ \t]+/, "", value)
            if (value == "" && index(known, " " key " ") == 0) { flush(); name = key }
            else if (value != "") value_of(key, value)
        } else value_of(key, piece)
    }
}
END { flush() }
