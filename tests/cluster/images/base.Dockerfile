# What a dynamically linked binary needs, from Debian packages: stands in for distroless `cc` where no image
# registry can be reached.
FROM scratch
ADD rootfs.tar /
COPY passwd /etc/passwd
USER 65532:65532
