# Redis from Debian packages.
FROM scratch
ADD rootfs.tar /
ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin
USER 999:999
