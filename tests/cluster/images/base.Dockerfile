# What a dynamically linked binary needs, from Debian packages: stands in for distroless `cc` where no image
# registry can be reached.
FROM scratch
ADD rootfs.tar /
# No script of a package runs, so the list of authorities is this machine's.
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY passwd /etc/passwd
USER 65532:65532
