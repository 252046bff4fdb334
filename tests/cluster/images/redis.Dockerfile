# Redis from Debian packages.
FROM scratch
ADD rootfs.tar /
COPY passwd /etc/passwd
ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin
USER 999:999
